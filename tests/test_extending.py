"""CONTRIBUTING.md, "A strategy": its strategy and its scenario, outside the repository, in each command."""

import dataclasses
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fedtune.config import Config
from fedtune.config.compose import compose
from fedtune.contracts.strategy import Requirements, ServerState, Strategy
from fedtune.errors import ConfigError
from fedtune.rounds.find_strategy import make_strategy
from tests.network.loopback import free_port
from tests.strategies.updates import random_adapter, update

PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
DOC = PAGE.partition("\n## A strategy\n")[2].partition("\n## ")[0]


@pytest.fixture
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the document's files, and an installed fedtune."""
    strategy, _ = re.findall(r"^```python\n(.*?)^```$", DOC, re.M | re.S)
    scenario, group = re.findall(r"^```yaml\n(.*?)^```$", DOC, re.M | re.S)
    (tmp_path / "mine.py").write_text(strategy)
    (tmp_path / "trial.yaml").write_text(scenario)
    (tmp_path / "strategy").mkdir()
    (tmp_path / "strategy" / "partial.yaml").write_text(group)
    here = os.getcwd()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", here)])  # as in a command that pip installs
    yield tmp_path
    for name in ("mine", "broken", "inside", "inside.code"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("args", [["conf=trial.yaml"], ["conf=base", "strategy._target_=mine.PartialStep", "+strategy.step=0.25"]])
@pytest.mark.usefixtures("away")
def test_the_document_s_strategy_is_found_and_works(args: list[str]) -> None:
    strategy = make_strategy(compose(args)[0].config)
    state, updates = (
        ServerState(adapter=random_adapter(0)),
        [update("a", random_adapter(1), examples=1), update("b", random_adapter(2), examples=3)],
    )
    after = strategy.aggregate(1, state, iter(updates)).adapter
    for name, t in state.adapter.tensors.items():
        mean = (updates[0].adapter[name] + 3 * updates[1].adapter[name]) / 4
        assert torch.allclose(after[name], 0.75 * t + 0.25 * mean, atol=1e-6)


def test_the_document_has_the_signatures_of_the_base_class() -> None:
    written = re.findall(r"^(?:    )?def (\w+)\((.*?)\) -> (.*?):", DOC, re.M)
    methods = {n: m for n, m in vars(Strategy).items() if inspect.isfunction(m)}
    assert sorted(name for name, _, _ in written) == sorted(methods)
    for name, args, result in written:
        plain = str(inspect.signature(methods[name], eval_str=False)).replace("collections.abc.", "")
        assert re.sub(r"(fedtune|collections|torch)(\.\w+)*\.", "", plain).replace("'", "") == f"({args}) -> {result}", name
    assert list(Strategy.__annotations__) == ["requirements"]
    fields = re.search(r"with the fields\n\((.*?)\)", DOC, re.S)
    assert fields and re.findall(r"\w+", fields[1]) == [f.name for f in dataclasses.fields(Requirements)]


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("mine.Nope", r"cannot be imported: .* of a module in the working directory \(there is no Nope in mine\)"),
        ("elsewhere.X", r"cannot be imported: .* \(ModuleNotFoundError: No module named 'elsewhere'\)"),
        ("broken.X", r"cannot be imported: .* \(ZeroDivisionError: division by zero\)"),
        ("broken", r"cannot be imported: .* \(it has no module name\)"),
        ("mine.Update", "is not a strategy: it must be a subclass of fedtune.contracts.strategy.Strategy"),
        ("mine.Bare", "cannot be constructed: TypeError: Can't instantiate abstract class Bare"),
        ("mine.Picky", "cannot be constructed: ValueError: no"),
    ],
)
def test_an_unusable_strategy_gives_a_one_sentence_error(away: Path, target: str, sentence: str) -> None:
    with (away / "mine.py").open("a") as f:
        f.write("\nclass Bare(Strategy): pass\nclass Picky(PartialStep):\n  def __init__(self): raise ValueError('no')\n")
    (away / "broken.py").write_text("1 / 0\n")
    with pytest.raises(ConfigError, match=sentence) as refused:
        make_strategy(Config(strategy={"_target_": target}))
    assert "\n" not in str(refused.value)


def test_code_inside_a_run_directory_is_refused_before_it_is_imported(away: Path) -> None:
    (away / "inside").mkdir()
    (away / "inside" / "code.py").write_text("open('ran', 'w')\n" + (away / "mine.py").read_text())
    config = Config(strategy={"_target_": "inside.code.PartialStep"})
    config.resume = "inside"
    with pytest.raises(ConfigError, match="names code inside the run directory inside: keep the module outside of it"):
        make_strategy(config)
    assert not (away / "ran").exists()
    config.resume = "another"
    assert type(make_strategy(config)).__name__ == "PartialStep" and (away / "ran").exists()


@pytest.mark.slow
def test_all_three_commands_run_the_strategy(away: Path) -> None:
    settings = ["conf=trial.yaml", "rounds=1", "clients_per_round=1", "client.steps=1", "eval.clients=0", "inference.samples=0"]
    bin, port = Path(sys.executable).parent, free_port()
    env = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [bin / "python", "-m", "fedtune.sim", *settings], cwd=away, env=env, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0 and "1/1 counted" in process.stderr, process.stderr
    program = [bin / "fedtune-server", *settings, "--insecure", "--address", f"127.0.0.1:{port}"]
    with subprocess.Popen(program, cwd=away, env=env, stderr=subprocess.PIPE, text=True) as server:
        (elsewhere := away / "elsewhere").mkdir()  # a folder without mine.py
        ask = ["--server", f"127.0.0.1:{port}", "--insecure", "--client-id", "home-000", "--state", elsewhere / "state"]
        client = subprocess.Popen([bin / "fedtune-client", *ask], cwd=elsewhere, env=env, stderr=subprocess.DEVNULL)
        try:
            _, stderr = server.communicate(timeout=300)
        finally:
            server.kill()
            client.kill()
            client.wait()
    assert server.returncode == 0 and "1/1 counted" in stderr, stderr
