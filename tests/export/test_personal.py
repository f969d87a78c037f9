"""Runs whose clients keep their own tensors: export of the personal model, and a note with the global one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedtune.cli.main import main
from fedtune.cli.simulate import main as simulate
from fedtune.clients.store import ClientStore
from fedtune.contracts.adapter_state import AdapterState
from fedtune.errors import CheckpointError, ModelError
from fedtune.export.edge import describe_package, export_edge
from fedtune.export.huggingface import describe_folder, export_hf
from fedtune.models import LiveAdapter
from fedtune.models.backbone import quiet
from tests.export.test_huggingface import CAUSAL, make_run
from tests.models.build import checkpoint, hub, token_ids

ID = "a/b c"  # any text may be a client's id


def logits(folder: Path) -> torch.Tensor:
    with quiet(), torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(token_ids()).logits


def personal_run(folder: Path) -> tuple[Path, LiveAdapter, Path]:
    """A run of FedSA after round 1: the server's B is zero, and the client stores its own; with the client's folder."""
    run, live = make_run(folder / "run", hub(checkpoint(folder / "m")), CAUSAL)
    state = live.read(1)
    own = {n: t for n, t in state.tensors.items() if n.endswith(".lora_B")}
    state.replace({n: torch.zeros_like(t) if n in own else t for n, t in state.tensors.items()}).save(run / "adapter/fedtune.safetensors")
    store = ClientStore(run / "clients", 3)
    store.write(ID, 1, state.replace(own))
    store.write(ID, 2, state.replace({n: t * 9 for n, t in own.items()}))  # later than the adapter's round, so not part of this model
    store.substore("residual").write("c", 1, state.replace(own))
    return run, live, store.folder_of(ID)


@pytest.mark.slow
def test_a_personal_model_is_the_common_part_and_the_clients_own(tmp_path: Path) -> None:
    run, live, client = personal_run(tmp_path)
    out = export_hf(client, tmp_path / "out")
    torch.testing.assert_close(logits(out), live.model(token_ids()).logits, rtol=0, atol=1e-5)
    assert json.loads((out / "fedtune.json").read_text())["client"] == ID and not describe_folder(out)


@pytest.mark.parametrize("to", ["hf", "edge"])
def test_the_export_of_a_personal_runs_global_model_has_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str) -> None:
    run, live, client = personal_run(tmp_path)
    for source in (run, run / "adapter"):
        assert main(["export", str(source), "--to", to, "--out", str(tmp_path / source.name / "out")]) == 0
        stderr = capsys.readouterr().err
        assert "each of 1 clients keeps tensors of its own" in stderr and "it is the untouched backbone" in stderr
        assert str(client) in stderr.replace("`", "")
    if to == "hf":
        with live.disabled():
            torch.testing.assert_close(logits(tmp_path / "run/out"), live.model(token_ids()).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "bitfit", "full"])
def test_the_export_of_an_adapter_without_effect_has_a_note(tmp_path: Path, method: str) -> None:
    run, live = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m", "qwen2")), CAUSAL, method=method)
    state = live.read(1)
    assert not describe_folder(export_hf(run, tmp_path / "trained"))
    state.replace({n: t * (not n.endswith("lora_B") and method == "lora") for n, t in state.tensors.items()}).save(
        run / "adapter/fedtune.safetensors"
    )
    assert "the model is the untouched backbone" in describe_folder(export_hf(run, tmp_path / "hf"))
    assert "the model is the untouched backbone" in describe_package(export_edge(run, tmp_path / "edge"))
    if method == "lora":  # as in FLoRA, the trained change is in the frozen weights
        state.save(run / "adapter" / "shift-0001.safetensors")
        assert not describe_folder(export_hf(run, tmp_path / "shifted")) and not describe_package(export_edge(run, tmp_path / "s"))


def test_a_gguf_export_has_the_note_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    from tests.export.test_gguf import SHORT, shaped_checkpoint

    run, live = make_run(tmp_path / "run", hub(shaped_checkpoint(tmp_path / "m", "qwen3")), SHORT)
    assert main(["export", str(run), "--to", "gguf", "--out", str(tmp_path / "a.gguf")]) == 0
    assert "untouched" not in capsys.readouterr().err
    state = live.read(1)
    state.replace({n: torch.zeros_like(t) for n, t in state.tensors.items()}).save(run / "adapter/fedtune.safetensors")
    assert main(["export", str(run), "--to", "gguf", "--out", str(tmp_path / "b.gguf")]) == 0
    assert "the model is the untouched backbone" in capsys.readouterr().err


def test_a_client_without_stored_tensors_or_with_another_models_is_refused(tmp_path: Path) -> None:
    run, live, client = personal_run(tmp_path)
    with pytest.raises(CheckpointError, match="client nobody keeps no tensors"):
        export_hf(run / "clients" / "nobody", tmp_path / "out")
    name, tensor = next(iter(live.read(1).tensors.items()))
    for tensors, message in (({"other.lora_B": tensor}, "keeps 'other.lora_B'"), ({name: tensor[:1]}, f"keeps '{name}'")):
        shutil.rmtree(client)
        ClientStore(run / "clients", 1).write(ID, 1, AdapterState(tensors, live.spec))
        with pytest.raises(ModelError, match=message):
            export_hf(client, tmp_path / "out")


@pytest.mark.slow
def test_a_run_of_fedsa_exports_personal_and_global_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = checkpoint(tmp_path / "m")
    rows = [{"prompt": "turn on the light", "answer": ("on", "off")[i % 2], "client": f"c{i % 2}"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = simulate([
        "strategy=fedsa", "data=local", f"data.path={tmp_path / 'rows.jsonl'}", "partition=natural", "rounds=1",
        "clients_per_round=2", "min_clients=1", "client.steps=2", "client.batch_size=2", "client.lr=0.1", "task.max_length=32",
        "task.max_new_tokens=4", "model=hub", f"model.name={model}", "model.device=cpu", "eval.where=none", "inference.samples=0",
        "inference.export=hf", "name=own",
    ])  # fmt: skip
    shown = capsys.readouterr()
    assert settings == 0, shown.err
    (run,) = (tmp_path / "outputs" / "own").iterdir()
    assert "each of 2 clients keeps tensors of its own" in " ".join(shown.out.split())
    assert "each of 2 clients keeps tensors of its own" in (run / "adapter" / "README.md").read_text()
    models = [logits(export_hf(run / "clients" / c, tmp_path / c)) for c in ("c0", "c1")]
    assert not torch.equal(models[0], models[1]) and not torch.equal(models[0], logits(run / "merged"))
