"""The output of a whole run: an adapter and a merged model for any program, and a complete run directory."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedtune.clients.workspace import Workspace
from fedtune.config import (
    Config,
    EvalConfig,
    InferenceConfig,
    ModelConfig,
    PartitionConfig,
    TaskConfig,
)
from fedtune.contracts.adapter_state import AdapterState
from fedtune.errors import Stopped
from fedtune.experiment import simulate
from fedtune.export.huggingface import export_hf
from fedtune.runs.report import read_metrics
from tests.quick import quick
from tests.tiny import tiny_config

TOKENS = torch.tensor([[5, 9, 301, 44, 12, 700]])


def run_logits(config: Config, run: Path) -> torch.Tensor:
    """The logits of the run's own model: its live backbone with the last adapter."""
    space = Workspace(config)
    space.live.load(AdapterState.load(run / "adapter" / "fedtune.safetensors"))
    with torch.inference_mode():
        return space.live.model.eval()(input_ids=TOKENS).logits


@pytest.mark.parametrize("kind", quick(["causal_lm", "classification"], "classification"))
def test_adapter_and_merged_model_give_the_runs_logits(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    config = tiny_config(tmp_path, task=TaskConfig(kind=kind, max_length=16, stride_texts=False), inference=InferenceConfig(export="hf"))
    run = simulate(config)
    expected = run_logits(config, run)
    auto = AutoModelForCausalLM if kind == "causal_lm" else AutoModelForSequenceClassification
    labels = {"num_labels": 3} if kind == "classification" else {}
    base = auto.from_pretrained(config.model.name, **labels)
    if kind == "classification":
        base.config.pad_token_id = 0
    adapted = PeftModel.from_pretrained(base, str(run / "adapter")).eval()
    merged = auto.from_pretrained(run / "merged").eval()
    with torch.inference_mode():
        assert (adapted(input_ids=TOKENS).logits - expected).abs().max() < 1e-5
        assert (merged(input_ids=TOKENS).logits - expected).abs().max() < 1e-5
    untouched = auto.from_pretrained(config.model.name, **labels).eval()
    if kind == "causal_lm":
        with torch.inference_mode():
            assert (untouched(input_ids=TOKENS).logits - expected).abs().max() > 1e-3  # the run has changed the model


def test_a_second_run_in_the_process_starts_from_the_original_backbone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flora = {"_target_": "fedtune.strategies.flora.FLoRA"}
    # without evaluations, only the start of a run restores the frozen weights
    config = tiny_config(tmp_path, task=TaskConfig(kind="classification", max_length=16), strategy=flora, rounds=3, clients_per_round=1)
    first, second = simulate(config), simulate(config)
    shifts = [f"shift-000{round}.safetensors" for round in (1, 2, 3)]
    for name in ("fedtune.safetensors", *shifts):
        assert (first / "adapter" / name).read_bytes() == (second / "adapter" / name).read_bytes()
    assert all(line.get("counted") == 1 for line in read_metrics(second) if line["client"] is None and line["round"] > 0)
    # files of a round without a checkpoint are not used
    (first / "adapter" / "shift-0001.safetensors").rename(first / "adapter" / "shift-0009.safetensors")
    simulate(dataclasses.replace(config, resume=str(first)))
    assert sorted(p.name for p in (first / "adapter").glob("shift-*")) == shifts


def test_the_run_directory_is_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = simulate(tiny_config(tmp_path, rounds=2, eval=EvalConfig(where="server", clients=-1)))
    names = {p.name for p in run.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "partition.json", "report.html", "adapter", "checkpoints"} <= names
    records = read_metrics(run)
    rounds = [r for r in records if r["client"] is None]
    assert [r["round"] for r in rounds] == [0, 1, 2]
    for r in rounds:  # the untuned backbone is round 0, with the same metrics
        assert {"loss", "perplexity", "clients_mean", "clients_worst_decile"} <= set(r)
        assert r["clients_worst_decile"] >= r["clients_mean"]  # a higher perplexity is worse
    turn = next(r for r in records if r["round"] == 1 and r["client"] == "c0")
    assert {"examples", "steps", "train_loss", "perplexity", "seconds", "bytes_up", "bytes_down", "peak_mb"} <= set(turn)
    partition = json.loads((run / "partition.json").read_text())
    assert [c["id"] for c in partition["clients"]] == ["c0", "c1", "c2", "c3"]


@pytest.mark.slow
def test_the_adapter_has_a_card_and_exports_like_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path, task=TaskConfig(kind="instruction", max_length=32, max_new_tokens=4), rounds=1)
    config.data.prompt, config.data.answer = "{question} ->", " {reply}"
    config.eval = EvalConfig(where="server", clients=0)
    run = simulate(config)
    card = (run / "adapter" / "README.md").read_text()
    assert "{question} ->" in card and "PeftModel.from_pretrained" in card and "[More Information Needed]" not in card
    for source, out in ((run, "a"), (run / "adapter", "b")):
        export_hf(source, tmp_path / out)
        assert json.loads((tmp_path / out / "fedtune.json").read_text())["prompt"] == "{question} ->"


def test_stopping_says_how_to_continue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import fedtune.experiment as app

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "_write_results", stop)
    with pytest.raises(Stopped, match=r"stopped; continue with resume=.*outputs/tiny/"):
        simulate(tiny_config(tmp_path, rounds=1))


@pytest.mark.slow
def test_bfloat16_trains_float32_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path)
    half = dataclasses.replace(config, model=dataclasses.replace(config.model, precision="bf16"))
    a, b = (AdapterState.load(simulate(c) / "adapter" / "fedtune.safetensors") for c in (config, half))
    assert all(t.dtype is torch.float32 for t in b.tensors.values())
    assert a.spec.base == b.spec.base  # one checkpoint in any precision: such clients can be in one cohort
    moved = sum(float(t.norm()) for n, t in a.tensors.items() if n.endswith("lora_B"))
    assert sum(float((a[n] - b[n]).norm()) for n in a.tensors if n.endswith("lora_B")) < 0.5 * moved


@pytest.mark.slow
def test_random_weights_are_drawn_from_the_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path, rounds=0, eval=EvalConfig(where="server", clients=0))
    losses = []
    for seed in (0, 0, 1):
        model = ModelConfig(source="hub", name=config.model.name, init="random")
        losses.append(read_metrics(simulate(dataclasses.replace(config, model=model, seed=seed)))[-1]["loss"])
    assert losses[0] == losses[1] != losses[2]


def test_one_class_clients_and_clients_with_one_row_take_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(
        tmp_path,
        task=TaskConfig(kind="classification", max_length=16),
        partition=PartitionConfig(kind="dirichlet", clients=12, alpha=0.05),
        clients_per_round=12,
        eval=EvalConfig(where="server", clients=-1),
    )
    records = read_metrics(simulate(config))
    last = records[-1]
    assert last["round"] == 2 and last["counted"] == last["cohort"] and last["dropped"] == {}
