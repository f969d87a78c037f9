"""Edge packages of decoders that differ from Llama: every form of package has the run's logits."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedtune.errors import ModelError
from fedtune.export.edge import export_edge
from fedtune.export.gguf import export_gguf
from fedtune.export.huggingface import export_hf
from fedtune.export.measured import streamed_score
from fedtune.export.merged import read_merged
from fedtune.inference.engine.package import read_package
from fedtune.inference.quantize.perplexity import windows
from fedtune.inference.serve.adapters import factors
from fedtune.models.backbone import quiet
from tests.export.test_huggingface import CAUSAL, make_run
from tests.inference.engine.tiny import tiny_model
from tests.inference.packages import TEXT, engine_logits, tensors_of
from tests.models.build import hub, token_ids, tokenizer
from tests.quick import quick

NEW = ["gemma2", "gemma2_biases", "gemma3", "gemma3_composite", "phi3", "phi4_mini", "smollm3", "smollm3_window", "olmo2", "olmo2_biases"]
FOLDED = {
    "gemma2": {"input_layernorm", "pre_feedforward_layernorm"},
    "phi3": {"input_layernorm", "post_attention_layernorm"},
    "olmo2": set(),
}


def folder_of(folder: Path, name: str) -> Path:
    tiny_model(name, folder)
    tokenizer().save_pretrained(folder)
    return folder


def live_logits(live: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return live.model(ids[None], attention_mask=torch.ones_like(ids[None])).logits[0][-len(ids) :]


@pytest.mark.parametrize("name", quick(NEW, "gemma3_composite", "phi4_mini"))
def test_a_package_has_the_logits_of_the_run(tmp_path: Path, name: str) -> None:
    run, live = make_run(tmp_path / "run", hub(folder_of(tmp_path / "m", name)), CAUSAL)
    ids = token_ids(1, 24)[0]
    want = live_logits(live, ids)
    with live.disabled():
        assert (live_logits(live, ids) - want).abs().max() > 0.02  # the adapter has an effect
    for out, adapter in ((export_edge(run, run / "edge"), None), (export_edge(run, run / "apart", separate=True), "run")):
        torch.testing.assert_close(engine_logits(out, ids, adapter), want, atol=1e-4, rtol=1e-4)
    with quiet(), torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(export_hf(run, run / "hf"), attn_implementation="eager")(ids[None]).logits[0]
    torch.testing.assert_close(merged, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(engine_logits(run / "hf", ids), want, atol=1e-4, rtol=1e-4)
    shape = read_package(run / "edge").shape
    assert factors(run / "adapter", shape).keys() == read_package(run / "apart").adapters["run"].keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_virtual_tokens_come_first(tmp_path: Path, name: str, method: str) -> None:
    run, live = make_run(tmp_path / "run", hub(folder_of(tmp_path / "m", name)), CAUSAL, method=method, std=0.5)
    ids = token_ids(1, 12)[0]
    torch.testing.assert_close(engine_logits(export_edge(run, run / "edge"), ids), live_logits(live, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", NEW)
def test_quantized_packages_are_close(tmp_path: Path, name: str) -> None:
    run, live = make_run(tmp_path / "run", hub(folder_of(tmp_path / "m", name)), CAUSAL)
    (tmp_path / "text.txt").write_text(TEXT)
    ids = token_ids(1, 24)[0]
    want, exact = live_logits(live, ids), read_package(export_edge(run, run / "edge"))
    before = streamed_score(read_merged(run), list(windows(ids, 24))).nats
    assert abs(before - torch.nn.functional.cross_entropy(want[:-1], ids[1:]).item()) < 1e-4
    for kind, method, most in (("int8", "rtn", 0.1), ("int8", "smoothquant", 0.1), ("int4", "rtn", 0.5), ("int4", "awq", 0.5),
                               ("int4", "gptq", 0.5)):  # fmt: skip
        out = export_edge(run, run / f"{kind}-{method}", quantize=kind, method=method, calibrate=tmp_path / "text.txt")
        package = read_package(out)
        assert ((engine_logits(out, ids) - want).norm() / want.norm()).item() < most, (kind, method)
        found = package.card["quantised"]["perplexity"]
        assert abs(math.log(found["after"] / found["before"])) < 0.5
        if name in FOLDED and method in ("awq", "smoothquant"):
            norms = [n for n in package.tensors if n.endswith("layernorm.weight")]
            moved = {n.split(".")[3] for n in norms if not torch.equal(tensors_of(package)[n], tensors_of(exact)[n])}
            assert moved == FOLDED[name]


def test_gguf_is_refused_where_llama_cpp_would_differ(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run", hub(folder_of(tmp_path / "m", "smollm3")), CAUSAL)
    with pytest.raises(ModelError, match="does not write GGUF files of model_type=smollm3: use --to edge or hf$"):
        export_gguf(run, run / "m.gguf")


def test_a_composite_model_in_a_package_is_its_text_part(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run", hub(folder_of(tmp_path / "m", "gemma3_composite")), CAUSAL)
    config = read_package(export_edge(run, run / "edge")).config
    assert config["model_type"] == "gemma3_text" and config["architectures"] == ["Gemma3ForCausalLM"] and "vision_config" not in config
