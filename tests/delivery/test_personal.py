"""A device runs its personal model from a run's adapter, or a delivered one, and its own state."""

import io
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedtune.cli.main import main
from fedtune.clients.store import ClientStore
from fedtune.delivery.personal import personal_model
from fedtune.errors import CheckpointError, ConfigError, ModelError
from fedtune.export.edge import export_edge
from fedtune.export.huggingface import export_hf
from fedtune.inference.generate import generate_text
from tests.delivery.test_install import Device, host_of, offer_of
from tests.export.test_huggingface import CAUSAL, make_run
from tests.export.test_personal import dual_run, logits, personal_run, random_state
from tests.inference.serve.servers import tiny_model
from tests.models.build import hub


@pytest.fixture
def state(tmp_path: Path) -> tuple[Path, Path]:
    """A run, and a device's state folder with the state of its client."""
    run, _, _ = dual_run(tmp_path, "anna")
    device = tmp_path / "state"
    shutil.copytree(run / "clients", device / "run/clients")
    (device / "logs").mkdir()
    return run, device


def test_a_device_has_the_exported_model(state: tuple[Path, Path], tmp_path: Path) -> None:
    run, device = state
    want = logits(export_hf(run, tmp_path / "out", client="anna"))
    bare = Path(shutil.copytree(run / "adapter", tmp_path / "adapter"))
    shutil.rmtree(run / "clients")
    for source in (run, run / "adapter", bare):
        for folder in (device, device / "run", device / "run/clients/anna"):
            with personal_model(source, folder) as model:
                assert torch.equal(logits(model), want)
            assert not model.parent.exists()


@pytest.mark.parametrize("client", ["a/b c", "ä" * 100])
def test_a_clients_folder_of_a_run_is_taken_too(tmp_path: Path, client: str) -> None:
    run, _, _ = dual_run(tmp_path, client)
    with personal_model(run, ClientStore(run / "clients", 1).folder_of(client)) as model:
        assert torch.equal(logits(model), logits(export_hf(run, tmp_path / "out", client=client)))


def test_kept_tensors_are_taken_too(tmp_path: Path) -> None:
    run, _, client = personal_run(tmp_path)
    with personal_model(run, client) as model:
        assert torch.equal(logits(model), logits(export_hf(client, tmp_path / "out")))


def test_a_folder_with_the_name_of_clients_is_a_device(state: tuple[Path, Path], tmp_path: Path) -> None:
    run, device = state
    (tmp_path / "clients").mkdir()
    with personal_model(run, device.rename(tmp_path / "clients/anna")) as model:
        assert torch.equal(logits(model), logits(export_hf(run, tmp_path / "out", client="anna")))


def test_the_commands_answer_with_the_personal_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, live = make_run(tmp_path / "run", hub(tiny_model(tmp_path / "m", context=128)), CAUSAL, std=0.3)
    ClientStore(tmp_path / "state/run/clients", 1).substore("turn-ditto").write("anna", 1, random_state(live.read(1), 1))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    given = [str(run), "--client-state", str(tmp_path / "state")]

    def answer(*argv: str) -> str:
        assert main([*argv]) == 0
        return capsys.readouterr().out.strip()

    assert not (run / "clients").exists()
    shutil.copytree(tmp_path / "state/run/clients", run / "clients")
    want = generate_text(export_hf(run, tmp_path / "own", client="anna"), "turn on", max_new_tokens=8).strip()
    assert want != generate_text(export_hf(run, tmp_path / "all"), "turn on", max_new_tokens=8).strip()
    assert answer("generate", *given[:1], "turn on", *given[1:], "--max-new-tokens", "8") == want
    chats = []
    for argv in (given, [str(tmp_path / "own")]):
        monkeypatch.setattr("sys.stdin", io.StringIO("turn on\n"))
        chats.append(answer("chat", *argv, "--max-new-tokens", "8"))
    assert chats[0] == chats[1] != ""
    assert answer("bench", *given, "--prompt-tokens", "4", "--new-tokens", "2", "--repeats", "1")
    assert not any((tmp_path / "tmp").iterdir())


def test_a_delivered_model_brings_its_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    device = Device(tmp_path)
    device.deliver(offer_of(device, 1, 0.01))
    own = device.adapter(0, 0.5)
    for round, state in ((1, own), (2, device.adapter(0, 0.9))):
        host_of(device).storage.store.substore("turn-ditto").write("anna", round, state)
    current = device.state / "models/current"
    sentence = "has no state of the run mine: give the folder of one run in it, such as .*/r"
    with pytest.raises(CheckpointError, match=sentence), personal_model(current, device.state):
        pass
    (device.state / "r").rename(device.state / "mine")  # the tests' hello names another run than their delivery
    version = current.resolve().parent
    run = Path(shutil.copytree(version / "source", tmp_path / "source"))
    ClientStore(run / "clients", 1).substore("turn-ditto").write("anna", 1, own)
    want = logits(export_hf(run, tmp_path / "want", client="anna"))
    for source in (current, version, version / "model"):
        with personal_model(source, device.state) as model:
            assert torch.equal(logits(model), want)
    assert main(["generate", str(current), "lamp", "--client-state", str(device.state), "--max-new-tokens", "4"]) == 0
    record = version / "record.json"
    record.write_text(record.read_text().replace('"chosen": "global"', '"chosen": "personal"'))
    sentence = "is this device's personal model already: leave out --client-state"
    with pytest.raises(ConfigError, match=sentence), personal_model(current, device.state):
        pass
    record.write_text("{")
    with pytest.raises(ModelError, match="is damaged"), personal_model(current, device.state):
        pass


@pytest.mark.parametrize(
    ("source", "folder", "what", "sentence"),
    [
        (
            lambda run, here: export_edge(run, here / "edge"),
            "state",
            ModelError,
            "has merged weights, which do not combine with a",
        ),
        (lambda run, here: export_hf(run, here / "hf"), "state", ModelError, "give the run or its adapter folder, or export the personal"),
        (lambda run, here: here / "m", "state", ModelError, "has merged weights"),
        (lambda run, here: here / "none", "state", CheckpointError, "there is no folder"),
        (lambda run, here: run, "none", CheckpointError, "none has no state of a client: give the --state folder of fedtune-client"),
        (lambda run, here: run, "m", CheckpointError, "m has no state of a client"),
        (lambda run, here: run.rename(here / "other"), "state", CheckpointError, "has no state of the run other: give the folder of one"),
        (lambda run, here: run, "state/run/clients/bert", CheckpointError, "there is no client 'bert' in .*: give one .*, such as 'anna'"),
    ],
)
def test_what_cannot_be_combined_is_refused(
    state: tuple[Path, Path], tmp_path: Path, source: Callable[[Path, Path], Path], folder: str, what: type[Exception], sentence: str
) -> None:
    with pytest.raises(what, match=sentence), personal_model(source(state[0], tmp_path), tmp_path / folder):
        pass


def test_a_foreign_adapter_or_an_unclear_state_is_refused(state: tuple[Path, Path], tmp_path: Path) -> None:
    run, device = state
    bare = Path(shutil.copytree(run / "adapter", tmp_path / "adapter"))

    def refused(what: type[Exception], sentence: str) -> None:
        with pytest.raises(what, match=sentence), personal_model(bare, device):
            pass

    shutil.copytree(device / "run", device / "second")
    refused(CheckpointError, "state has states of 2 runs: give the folder of one run in it, such as .*/state/run")
    shutil.rmtree(device / "second")
    store = ClientStore(device / "run/clients", 1)
    store.substore("turn-mine").write("bert", 1, random_state(store.substore("turn-feddpa").read("anna", 2) or pytest.fail(), 1))
    refused(CheckpointError, "run has the states of 2 clients: give the folder of one, such as .*/state/run/clients/anna")
    shutil.rmtree(device / "run/clients/.turn-mine")
    (bare / "fedtune.safetensors").unlink()
    refused(ModelError, "has no fedtune.safetensors, which says the adapter's round: give the run or the adapter folder that fedtune wrote")
