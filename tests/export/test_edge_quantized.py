"""Quantized edge packages: the error and its report."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config

from fedtune.config import DataConfig
from fedtune.errors import ConfigError
from fedtune.export.edge import describe_package, export_edge
from fedtune.export.measured import streamed_score
from fedtune.export.merged import read_merged
from fedtune.inference.engine.load import load_engine
from fedtune.inference.engine.package import read_package
from fedtune.inference.quantize.perplexity import of_engine, perplexity, windows
from fedtune.models import LiveAdapter
from tests.export.test_huggingface import CAUSAL, make_run
from tests.inference.packages import AWKWARD, TEXT, matrix, save, tensors_of
from tests.models.build import checkpoint, hub, llama_config
from tests.quick import quick


@pytest.mark.parametrize(("quantize", "most"), [("int8", 0.01), ("int4", 0.12)])
@pytest.mark.parametrize("tie", [True, False])
def test_quantized_weights_are_close_to_the_merged_ones(tmp_path: Path, quantize: str, most: float, tie: bool) -> None:
    config = llama_config(Qwen3Config, **AWKWARD, tie_word_embeddings=tie)
    run, _ = make_run(tmp_path / "run", hub(save(tmp_path / "m", config)), CAUSAL)
    exact = read_package(export_edge(run, run / "edge"))
    package = read_package(export_edge(run, run / "edge-q", quantize=quantize))
    assert package.shape.tied is False and package.linears["lm_head"].kind == "int8"
    for name, kept in package.linears.items():
        assert kept.kind == ("int8" if name == "lm_head" else quantize)
        own = "model.embed_tokens.weight" if tie and name == "lm_head" else f"{name}.weight"
        wanted = tensors_of(exact)[own]
        assert 0 < ((matrix(package, name) - wanted).norm() / wanted.norm()).item() < most
    embedding = tensors_of(package)["model.embed_tokens.weight"]
    assert torch.equal(embedding, tensors_of(exact)["model.embed_tokens.weight"].bfloat16())
    figures = package.card["quantised"]
    assert figures["kind"] == quantize and figures["method"] == "rtn" and 0 < figures["weights_mean"] <= figures["weights_max"] < most
    norms = [n for n in package.tensors if "norm" in n]
    assert norms and all(torch.equal(tensors_of(package)[n], tensors_of(exact)[n]) for n in norms)


@pytest.mark.parametrize("tie", [True, False])
def test_the_perplexity_before_is_that_of_the_whole_model(tmp_path: Path, tie: bool) -> None:
    config = llama_config(Qwen3Config, **AWKWARD, tie_word_embeddings=tie)
    for method in ("lora", "prompt"):
        run, live = make_run(tmp_path / method, hub(save(tmp_path / f"m-{method}", config)), CAUSAL, method=method)
        ids = torch.randint(3, 35, (51,), generator=torch.Generator().manual_seed(2))
        actual = streamed_score(read_merged(run), list(windows(ids, 9)))

        def logits(piece: torch.Tensor, live: LiveAdapter = live) -> torch.Tensor:
            return live.model(piece[None], attention_mask=torch.ones(1, len(piece))).logits[0, -len(piece) :]

        wanted = perplexity(logits, ids, window=9)
        assert actual.tokens == wanted.tokens == 50
        assert abs(actual.nats - wanted.nats) < 1e-5
        assert abs(perplexity(of_engine(load_engine(export_edge(run, run / "edge"))), ids, window=9).nats - wanted.nats) < 1e-5


@pytest.mark.parametrize(
    ("quantize", "method"),
    quick([("int4", "gptq"), ("int4", "awq"), ("int8", "smoothquant"), ("int4", "rtn")], ("int4", "gptq"), ("int8", "smoothquant")),
)
def test_a_calibrated_package_reports_both_perplexities(tmp_path: Path, quantize: str, method: str) -> None:
    run, _ = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), CAUSAL)
    (tmp_path / "text.txt").write_text(TEXT)
    out = export_edge(run, run / "edge", quantize=quantize, method=method, calibrate=tmp_path / "text.txt")
    package = read_package(out)
    figures = package.card["quantised"]
    found = figures["perplexity"]
    assert (figures["kind"], figures["method"], found["text"]) == (quantize, method, "calibrate")
    assert found["tokens"] > 20 and abs(math.log(found["after"] / found["before"])) < 0.5
    sentence = f"perplexity on {found['tokens']} held-out tokens of the calibration text, requests included: {found['before']:.4g} before"
    assert sentence in describe_package(out)
    exact = read_package(export_edge(run, run / "exact"))
    changed = not torch.equal(tensors_of(package)["model.norm.weight"], tensors_of(exact)["model.norm.weight"])
    assert changed == (method in ("awq", "smoothquant"))  # they fold scales into the norms


@pytest.mark.parametrize(("tie", "method"), [(True, "rtn"), (False, "awq")])
def test_the_heads_format_is_chosen_and_its_cost_is_reported(tmp_path: Path, tie: bool, method: str) -> None:
    run, _ = make_run(tmp_path / "run", hub(save(tmp_path / "m", llama_config(Qwen3Config, **AWKWARD, tie_word_embeddings=tie))), CAUSAL)
    (tmp_path / "text.txt").write_text(TEXT)
    how = {"quantize": "int4", "method": method, "calibrate": tmp_path / "text.txt"}
    small, whole = (export_edge(run, run / f"edge-{head}", **how, head=head) for head in ("int4", None))
    package, figures = read_package(small), [read_package(out).card["quantised"] for out in (small, whole)]
    assert {kept.kind for kept in package.linears.values()} == {"int4"} and [f["head"] for f in figures] == ["int4", "int8"]
    assert load_engine(small).decoder.head.kind == "int4" and load_engine(whole).decoder.head.kind == "int8"
    few, many = (f["perplexity"] for f in figures)
    # with the head in bfloat16 both are one model, and int8 costs almost nothing
    assert few["whole_head"] == pytest.approx(many["after"], rel=5e-3) and few["after"] != few["whole_head"]
    assert f"bfloat16 instead of int4, it would be {few['whole_head']:.4g}" in describe_package(small) and "whole_head" not in many
    with pytest.raises(ConfigError, match="--head has an effect only with quantization: add --quantize int8 or int4"):
        export_edge(run, run / "other", head="int4")


def test_without_calibration_perplexity_is_measured_on_the_runs_test(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": t, "client": "a"}) for t in TEXT.split("\n\n") if t))
    shutil.copyfile(rows, tmp_path / "test.jsonl")
    data = DataConfig(source="local", path=str(rows), test_path=str(tmp_path / "test.jsonl"), columns={"client": "client"})
    run, _ = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), CAUSAL, data=data)
    result = read_package(export_edge(run, run / "edge", quantize="int8")).card["quantised"]["perplexity"]
    assert result["text"] == "the run's global test" and result["before"] > 1 and result["after"] > 1
    with pytest.raises(ConfigError, match="--method gptq needs calibration text"):
        export_edge(run, run / "other", quantize="int8", method="gptq")
    with pytest.raises(ConfigError, match="add --quantize int8 or int4"):
        export_edge(run, run / "other", method="rtn")
