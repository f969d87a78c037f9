"""Runs whose clients keep state of their own: export of the personal model, and a note with the global one."""

import dataclasses
import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedtune.cli.main import main
from fedtune.cli.simulate import main as run_simulation
from fedtune.clients import turns
from fedtune.clients.store import ClientStore
from fedtune.clients.turns import TURNS, Turn, find
from fedtune.config import PeftConfig, TaskConfig
from fedtune.config.compose import compose
from fedtune.contracts.adapter_state import AdapterState
from fedtune.errors import CheckpointError, ModelError
from fedtune.experiment import simulate
from fedtune.export.edge import describe_package, export_edge
from fedtune.export.huggingface import describe_folder, export_hf
from fedtune.inference.generate import generate_text
from fedtune.library import load_run
from fedtune.models import LiveAdapter, load_backbone
from fedtune.models.backbone import quiet
from tests.conformance.test_strategies import KEEP_TENSORS
from tests.export.test_huggingface import CAUSAL, CLASSES, make_run
from tests.inference.packages import engine_logits
from tests.models.build import checkpoint, hub, token_ids
from tests.tiny import tiny_config

ID = "a/b c"  # any text may be a client's id
PERSONAL = sorted(name for name in TURNS.own() if find(name).is_personal())


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
        assert f"`{shlex.join(['fedtune', 'export', str(run), '--client', ID])}`" in stderr
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


def test_stored_tensors_of_another_model_are_refused(tmp_path: Path) -> None:
    run, live, client = personal_run(tmp_path)
    name, tensor = next(iter(live.read(1).tensors.items()))
    for tensors, message in (({"other.lora_B": tensor}, "keeps 'other.lora_B'"), ({name: tensor[:1]}, f"keeps '{name}'")):
        shutil.rmtree(client)
        ClientStore(run / "clients", 1).write(ID, 1, AdapterState(tensors, live.spec))
        with pytest.raises(ModelError, match=message):
            export_hf(client, tmp_path / "out")


# -- a turn's own state -------------------------------------------------------------------------------------------------------------------


def random_state(like: AdapterState, seed: int, **extra: float) -> AdapterState:
    """A state with the tensors of `like` at random, and these scalars."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {n: torch.randn(t.shape, generator=generator) * 0.1 for n, t in like.tensors.items()}
    return like.replace({**tensors, **{n: torch.tensor(v, dtype=torch.float64) for n, v in extra.items()}}, version=0)


def dual_run(folder: Path, client: str = "c0", task: TaskConfig = CAUSAL) -> tuple[Path, LiveAdapter, AdapterState]:
    """A run, the state of a client of FedDPA after rounds 1 (m = 0.25) and 2; with a slot of both ranks, and the local adapter of round 1.

    The adapter is that of round 1.
    """
    run, live = make_run(folder / "run", hub(checkpoint(folder / "m")), task)
    both = LiveAdapter(load_backbone(hub(folder / "m"), task, num_labels=3), PeftConfig(rank=6, alpha=24.0), task)  # the same scaling
    store, local = ClientStore(run / "clients", 3).substore("turn-feddpa"), random_state(live.read(1), 1)
    store.write(client, 1, local.replace({**local.tensors, "feddpa.mix": torch.tensor(0.25)}))
    store.write(client, 2, random_state(live.read(1), 2, **{"feddpa.mix": 1.0}))
    return run, both, local


def mixed(run: Path, both: LiveAdapter, local: AdapterState) -> torch.Tensor:
    """The logits of ¾·shared + ¼·local."""
    shared = AdapterState.load(run / "adapter/fedtune.safetensors")
    tensors = {}
    for name, g in shared.tensors.items():
        parts = [0.75 * g, 0.25 * local[name]]
        tensors[name] = torch.cat([g, local[name]]) if name.endswith("lora_A") else torch.cat(parts, dim=1)
        if not name.endswith(("lora_A", "lora_B")):  # a head
            tensors[name] = parts[0] + parts[1]
    both.load(both.read(0).replace(tensors))
    with torch.no_grad():
        return both.model(token_ids()).logits


def test_a_mixture_is_exported_with_its_larger_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, both, local = dual_run(tmp_path)
    want = mixed(run, both, local)
    assert main(["export", str(run), "--client", "c0"]) == 0
    out = run / "clients/c0/merged"
    assert capsys.readouterr().out.strip() == str(out) and json.loads((out / "fedtune.json").read_text())["client"] == "c0"
    torch.testing.assert_close(logits(out), want, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(export_hf(run / "adapter", tmp_path / "a", client="c0")), want, rtol=0, atol=1e-5)
    personal = load_run(run).personal_adapter("c0")
    assert set(personal.spec.ranks.values()) == {6} and personal.spec.version == 1
    for out, name in (("edge", None), ("apart", "run")):
        flags = ["--separate"] if name else []
        assert main(["export", str(run), "--client", "c0", "--to", "edge", "--out", str(tmp_path / out), *flags]) == 0
        torch.testing.assert_close(engine_logits(tmp_path / out, token_ids()[0], name), want[0], rtol=0, atol=1e-4)
    assert ClientStore(run / "clients", 1).clients() == [], "the export is no state"


def test_a_classifiers_head_is_mixed_too(tmp_path: Path) -> None:
    run, both, local = dual_run(tmp_path, task=CLASSES)
    with quiet(), torch.no_grad():
        got = AutoModelForSequenceClassification.from_pretrained(export_hf(run, tmp_path / "out", client="c0"))(token_ids()).logits
    torch.testing.assert_close(got, mixed(run, both, local), rtol=0, atol=1e-5)


def test_the_folder_of_an_earlier_export_is_no_state(tmp_path: Path) -> None:
    run, both, local = dual_run(tmp_path, long := "ä" * 100)  # its folder's name is shortened
    for name in ("merged", "again"):
        folder = ClientStore(run / "clients", 1).folder_of(long)
        assert json.loads((export_hf(folder, folder / name) / "fedtune.json").read_text())["client"] == long


def test_every_format_takes_a_client(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from tests.export.test_gguf import SHORT, shaped_checkpoint

    run, live = make_run(tmp_path / "run", hub(shaped_checkpoint(tmp_path / "m", "qwen3")), SHORT)
    ClientStore(run / "clients", 1).substore("turn-ditto").write("c0", 1, random_state(live.read(1), 1))
    for to in ("gguf", "ollama", "vllm"):  # gptq and awq read the model as gguf does
        client, common = tmp_path / f"client-{to}", tmp_path / to
        assert not main(["export", str(run), "--client", "c0", "--to", to, "--out", str(client)])
        assert not main(["export", str(run), "--to", to, "--out", str(common)])
        files = [next(p.rglob("model*")) if p.is_dir() else p for p in (client, common)]
        assert files[0].read_bytes() != files[1].read_bytes()
        if to != "gguf":
            assert json.loads((client / "fedtune.json").read_text())["client"] == "c0"


def test_an_adapter_that_cannot_be_merged_is_written_beside_the_model(tmp_path: Path) -> None:
    run, live = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), CAUSAL, method="prompt")
    own = random_state(live.read(1), 1)
    ClientStore(run / "clients", 1).substore("turn-ditto").write("c0", 1, own)
    out = export_hf(run, tmp_path / "out", client="c0")
    kept = AdapterState.load(out / "adapter/fedtune.safetensors")
    assert all(torch.equal(kept[n], t) for n, t in own.tensors.items())
    assert "PeftModel" not in describe_folder(out) and "PeftModel" in describe_folder(export_hf(run, tmp_path / "all"))
    assert generate_text(out, "turn on", max_new_tokens=4) == generate_text(
        export_edge(run / "clients/c0", tmp_path / "edge"), "turn on", max_new_tokens=4
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PERSONAL, *sorted(KEEP_TENSORS)])  # a turn has the name of its strategy
def test_the_personal_model_of_each_method_is_exported(tmp_path: Path, name: str) -> None:
    (job,) = compose([f"strategy={name}"])
    config = tiny_config(tmp_path, strategy=job.config.strategy)
    run = simulate(config)
    live = LiveAdapter(load_backbone(config.model, config.task), config.peft, config.task)

    def check(client: str, out: str) -> torch.Tensor:
        shared = AdapterState.load(run / "adapter/fedtune.safetensors")
        store = ClientStore(run / "clients", 1)
        kept = (store if name in KEEP_TENSORS else store.substore(f"turn-{name}")).read(client, shared.spec.version + 1)
        assert kept is not None
        live.load(shared.replace({**shared.tensors, **kept.tensors}) if name in KEEP_TENSORS else find(name).personal(shared, kept))
        with torch.no_grad():
            want = live.model(token_ids()).logits
        got = logits(export_hf(run, tmp_path / out, client=client))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        return got

    first, second, common = check("c0", "0"), check("c1", "1"), logits(export_hf(run, tmp_path / "all"))
    assert not torch.equal(first, second) and not torch.equal(first, common)
    assert "each of 4 clients keeps tensors of its own" in (run / "adapter/README.md").read_text()
    adapter = Path(shutil.copytree(run / "adapter", tmp_path / "adapter"))
    simulate(dataclasses.replace(config, resume=str(run), rounds=3))
    later = check("c0", "later")
    assert not torch.equal(later, first)
    shutil.rmtree(run / "adapter")
    adapter.rename(run / "adapter")  # the earlier adapter, with the state that belongs to it
    assert torch.equal(check("c0", "again"), first)


def test_the_newest_of_several_turns_counts(tmp_path: Path) -> None:
    run, both, local = dual_run(tmp_path)
    store = ClientStore(run / "clients", 3)
    store.write("c0", 1, random_state(both.read(0), 1).subset([]))  # a round that kept no tensor
    store.substore("turn-ditto").write("c0", 0, local)
    store.substore("turn-scaffold").write("c0", 1, local)  # its turn has no personal adapter
    store.substore("turn-gone").write("c0", 0, local)
    out = export_hf(run, tmp_path / "out", client="c0")
    torch.testing.assert_close(logits(out), mixed(run, both, local), rtol=0, atol=1e-5)
    assert "states of several turns (ditto, feddpa, gone): this model has the newest, of feddpa in round 1" in describe_folder(out)


@pytest.mark.parametrize("to", ["hf", "edge"])
def test_a_client_without_a_personal_model_is_refused(tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str]) -> None:
    run, _, local = dual_run(tmp_path)
    (run / "partition.json").write_text(json.dumps({"labels": [], "clients": [{"id": "c0"}, {"id": "c1"}, {"id": "c2"}]}))
    ClientStore(run / "clients", 3).substore("turn-feddpa").write("c2", 2, local)

    def refused(*source: str) -> str:
        assert main(["export", *source, "--to", to]) == 2
        return capsys.readouterr().err

    long = "ä" * 200  # its folder's name is shortened
    for name in ("nobody", long):
        assert "there is no client 'nobody' in" in (error := refused(str(run), "--client", name)) or "'äää" in error
        assert "give one with a personal model, such as 'c0', 'c2'" in error
    assert "there is no client 'nobody'" in refused(str(run / "clients/nobody"))
    assert "client c1 has no personal model in" in refused(str(run), "--client", "c1")
    assert f"client c2 in {run / 'clients'} are newer than the adapter, which is of round 1" in refused(str(run), "--client", "c2")
    assert "is not a run directory, so it has no client 'c0'" in refused(str(run / "clients/c0"), "--client", "c0")
    shutil.rmtree(run / "clients")
    assert "no client has a personal model in" in refused(str(run), "--client", "c0")


def test_a_damaged_or_foreign_state_is_refused(tmp_path: Path) -> None:
    run, both, local = dual_run(tmp_path)
    store = ClientStore(run / "clients", 3).substore("turn-feddpa")
    file = store.folder_of("c0") / "round-0001.safetensors"
    whole, state = file.read_bytes(), AdapterState.load(file)

    def refused(what: type[Exception], match: str) -> None:
        with pytest.raises(what, match=match):
            export_hf(run, tmp_path / "out", client="c0")

    file.write_bytes(whole[:-50])
    refused(CheckpointError, "round-0001.safetensors.*: restore this file, or delete it to take the client's state of an earlier turn")
    name = next(iter(local.tensors))
    for tensors in (
        local.tensors,  # without m
        {"feddpa.mix": state["feddpa.mix"]},
        {**state.tensors, "feddpa.mix": torch.ones(2)},
        {**state.tensors, name: state[name][:, :2]},
        {**state.tensors, "feddpa.mix": state["feddpa.mix"], name: state[name][:1]},
    ):
        store.write("c0", 1, state.replace(tensors))
        refused(ModelError, "is no state of the turn 'feddpa' that fits the adapter: give the state and the adapter of the same run")
    store.write("c0", 1, state.replace(base="another"))
    refused(ModelError, "belongs to the backbone another, but the adapter to")


def test_a_run_directory_does_not_decide_which_code_makes_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, both, local = dual_run(tmp_path)
    shutil.rmtree(run / "clients")
    (tmp_path / "evil.py").write_text("raise SystemExit('the code of a run directory has run')\n")
    monkeypatch.syspath_prepend(tmp_path)
    store = ClientStore(run / "clients", 3)
    for name in ("evil", "mine.evil", "_beside", "..", "feddpa.py"):
        (folder := run / "clients" / f".turn-{name}" / "c0").mkdir(parents=True)
        local.save(folder / "round-0001.safetensors")
        with pytest.raises(CheckpointError, match="which this process does not have: update fedtune, or call fedtune.export_hf in the"):
            export_hf(run, tmp_path / "out", client="c0")
        shutil.rmtree(folder.parent)
    store.substore("turn-evil").write("c0", 1, local)
    assert not describe_folder(export_hf(run, tmp_path / "all"))

    class Mine(Turn):
        @classmethod
        def personal(cls, given: AdapterState, kept: AdapterState | None) -> AdapterState:
            return kept or given

    turns.register("evil", Mine)
    try:
        own = logits(export_hf(run, tmp_path / "own", client="c0"))
        assert "each of 1 clients" in describe_folder(export_hf(run, tmp_path / "common"))
    finally:
        TURNS.remove("evil")
    assert not torch.equal(own, logits(tmp_path / "all"))


@pytest.mark.slow
def test_a_run_of_fedsa_exports_personal_and_global_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = checkpoint(tmp_path / "m")
    rows = [{"prompt": "turn on the light", "answer": ("on", "off")[i % 2], "client": f"c{i % 2}"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = run_simulation([
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
