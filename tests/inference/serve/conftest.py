import pytest

from fedtune.inference.engine.load import Engine, load_engine
from tests.inference.serve.servers import tiny_model


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """A tiny random model with a chat template and 512 tokens of context."""
    return load_engine(tiny_model(tmp_path_factory.mktemp("served") / "tiny"))
