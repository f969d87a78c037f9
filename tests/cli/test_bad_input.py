"""Invalid input to any command: one sentence on stderr, exit code 2, no traceback, and no run that looks finished.

This table uses the commands. test_simulate.py tests configs, tests/data data sources, and tests/rounds the replies of clients.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from fedtune.cli.main import main as fedtune
from fedtune.cli.simulate import main as sim
from fedtune.config import to_dict
from fedtune.experiment import simulate
from tests.tiny import tiny_config, tiny_llama


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment that works, a run of it, and its scenario file."""
    folder = tmp_path_factory.mktemp("good")
    config = tiny_config(folder, rounds=1)
    simulate(config).rename(folder / "run")
    values = {k: v for k, v in to_dict(config).items() if k not in ("resume",)}
    values["defaults"] = ["base", "_self_"]
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.fixture
def place(good: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(good, tmp_path / "x", dirs_exist_ok=True)
    text = (tmp_path / "x" / "tiny.yaml").read_text().replace(str(good), str(tmp_path / "x"))
    (tmp_path / "x" / "tiny.yaml").write_text(text)
    config = tmp_path / "x" / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(good), str(tmp_path / "x")))
    return tmp_path / "x"


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut(path: Path, share: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def to_pickle(model: Path) -> None:
    torch.save({"w": torch.zeros(1)}, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def drop_tensor(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors.pop("model.layers.0.self_attn.q_proj.weight")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def other_backbone(place: Path) -> None:
    shutil.rmtree(place / "model")
    tiny_llama(place / "model", seed=5)


def edit_rounds(place: Path) -> None:
    """A run that has done more rounds than the test asks for."""
    (place / "run/checkpoints/round-0001").rename(place / "run/checkpoints/round-0003")
    edit_json(place / "run/checkpoints/round-0003/checkpoint.json", round=3)


def damage_all_checkpoints(place: Path) -> None:
    for path in (place / "run" / "checkpoints").glob("*/adapter.safetensors"):
        cut(path)


SIM = [
    ("no model folder", lambda p: shutil.rmtree(p / "model"), [], "model"),
    ("no config.json", lambda p: (p / "model/config.json").unlink(), [], "config.json"),
    ("config.json is not JSON", lambda p: (p / "model/config.json").write_text("{"), [], "config.json"),
    ("unknown architecture", lambda p: edit_json(p / "model/config.json", model_type="perceptron"), [], "perceptron"),
    ("truncated weights", lambda p: cut(p / "model/model.safetensors"), [], "model.safetensors"),
    ("a tensor is missing", lambda p: drop_tensor(p / "model"), [], "q_proj"),
    ("pickled weights only", lambda p: to_pickle(p / "model"), [], "safetensors"),
    ("no tokenizer", lambda p: [(p / "model" / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")], [], "tokeni"),
    ("no data file", lambda p: (p / "rows.jsonl").unlink(), [], "rows.jsonl"),
    ("empty data file", lambda p: (p / "rows.jsonl").write_text(""), [], "rows.jsonl"),
    ("a broken line", lambda p: (p / "rows.jsonl").write_text('{"text": "a", "client": "c"}\n{"text": \n'), [], "line 2"),
    ("a missing column", lambda p: None, ["+data.columns={text: story}"], "story"),
    ("bad encoding", lambda p: (p / "rows.jsonl").write_bytes(b'{"text": "caf\xe9", "client": "c"}\n'), [], "utf-8"),
    ("no client column", lambda p: (p / "rows.jsonl").write_text('{"text": "a b c d"}\n'), [], "client"),
    ("more clients than rows", lambda p: None, ["partition.kind=iid", "partition.clients=1000"], "1000"),
    ("targets match nothing", lambda p: None, ["peft.targets=qq_proj"], "qq_proj"),
    ("ray asks for too much", lambda p: None, ["engine.kind=ray", "engine.ray_cpus=9999"], "engine.ray_cpus=9999"),
    ("folder cannot be written", lambda p: (p / "blocked").write_text(""), ["output_dir=$/blocked"], "cannot create the run directory"),
    ("too few clients", lambda p: None, ["partition.min_examples=999"], "min_examples"),
]

RESUME = [
    ("no run", lambda p: shutil.rmtree(p / "run"), "there is no run directory"),
    ("no config.yaml", lambda p: (p / "run/config.yaml").unlink(), "not a run directory"),
    ("a config of another version", lambda p: (p / "run/config.yaml").write_text("surprise: 1"), "unknown config key surprise"),
    ("another backbone", other_backbone, "backbone"),
    ("fewer rounds than are done", lambda p: edit_rounds(p), "rounds=2 is less than the 3 rounds"),
    ("every checkpoint damaged", damage_all_checkpoints, "damaged"),
]

EXPORT = [
    ("no adapter", lambda p: shutil.rmtree(p / "run/adapter"), "adapter"),
    ("a metric that is none", lambda p: (p / "run/config.yaml").write_text("- 1"), "config"),
    ("truncated adapter", lambda p: [cut(f) for f in (p / "run/adapter").glob("*.safetensors")], "adapter"),
    ("another backbone", other_backbone, "backbone"),
    ("no backbone", lambda p: shutil.rmtree(p / "model"), "model"),
    ("a folder in the way", lambda p: [(p / "run/merged").mkdir(), (p / "run/merged/mine.txt").write_text("x")], "merged"),
]


def assert_one_sentence(code: int, err: str, expected: str) -> None:
    lines = [line for line in err.splitlines() if line.startswith("fedtune: ")]
    assert code == 2 and len(lines) == 1 and expected in lines[0], err
    assert "Traceback" not in err and len(lines[0]) < 450


@pytest.mark.parametrize(("spoil", "args", "expected"), [c[1:] for c in SIM], ids=[c[0] for c in SIM])
def test_bad_input_of_a_simulation(
    place: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], object], args: list[str], expected: str
) -> None:
    spoil(place)
    code = sim([f"conf={place}/tiny.yaml", *(a.replace("$", str(place)) for a in args)])
    assert_one_sentence(code, capsys.readouterr().err, expected)
    assert not list(place.glob("outputs/*/*/adapter"))


@pytest.mark.parametrize(("spoil", "expected"), [c[1:] for c in RESUME], ids=[c[0] for c in RESUME])
def test_bad_input_of_a_resumed_run(
    place: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], object], expected: str
) -> None:
    spoil(place)
    code = sim([f"resume={place}/run", "rounds=2"])
    assert_one_sentence(code, capsys.readouterr().err, expected)


@pytest.mark.parametrize(("spoil", "expected"), [c[1:] for c in EXPORT], ids=[c[0] for c in EXPORT])
def test_bad_input_of_an_export(place: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], object], expected: str) -> None:
    spoil(place)
    assert_one_sentence(fedtune(["export", str(place / "run")]), capsys.readouterr().err, expected)


def test_generating_from_a_missing_folder_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_one_sentence(fedtune(["generate", str(place / "nowhere"), "hello"]), capsys.readouterr().err, "nowhere")


def test_the_unmodified_input_works(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # so the errors above come from the damage
    assert sim([f"conf={place}/tiny.yaml"]) == 0
    assert sim([f"resume={place}/run", "rounds=2"]) == 0
    assert fedtune(["export", str(place / "run")]) == 0
    assert fedtune(["generate", str(place / "run/merged"), "lamp", "--max-new-tokens", "8"]) == 0
