"""Edge packages: merged weights and separate adapters."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import DynamicCache, MistralConfig, Qwen2Config, Qwen3Config

from fedtune.errors import ModelError
from fedtune.export.edge import export_edge
from fedtune.export.huggingface import export_hf
from fedtune.export.merged import read_merged
from fedtune.inference.engine.package import read_package
from tests.export.test_huggingface import CAUSAL, make_run
from tests.export.test_streamed import in_memory
from tests.inference.packages import AWKWARD, engine_logits, open_model, save, tensors_of, with_shifts
from tests.models.build import checkpoint, hub, llama_config, token_ids


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "ia3", "full", "ravan", "fedsb"])
def test_every_tensor_equals_that_of_a_merge_in_memory(tmp_path: Path, method: str) -> None:
    run, _ = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), CAUSAL, method=method)
    whole = open_model(in_memory(run, run / "merged")).state_dict()
    package = read_package(export_edge(run, run / "edge"))
    assert set(package.tensors) == set(whole) - {"lm_head.weight"}  # tied
    for name in package.tensors:
        assert torch.equal(tensors_of(package)[name], whole[name]), name
    assert {x.kind for x in package.linears.values()} == {"fp32"}


def test_biases_are_trained_by_bitfit_and_scaled_by_ia3(tmp_path: Path) -> None:
    save(tmp_path / "m", llama_config(Qwen2Config))
    for method in ("bitfit", "ia3"):
        run, _ = make_run(tmp_path / method, hub(tmp_path / "m"), CAUSAL, method=method)
        whole = open_model(in_memory(run, run / "merged")).state_dict()
        package = read_package(export_edge(run, run / "edge"))
        name = "model.layers.1.self_attn.v_proj.bias"
        assert torch.equal(torch.from_numpy(package.linear(name.removesuffix(".bias"))["bias"]), whole[name])
        assert not torch.equal(whole[name], load_file(tmp_path / "m" / "model.safetensors")[name])


@pytest.mark.parametrize("kind", [Qwen2Config, Qwen3Config, MistralConfig])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_awkward_shapes_in_several_shards_are_merged_as_in_memory(tmp_path: Path, kind: type, dtype: torch.dtype) -> None:
    config = llama_config(kind, **AWKWARD, tie_word_embeddings=False)
    save(tmp_path / "m", config, dtype, "8KB")
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 2
    run, _ = make_run(tmp_path / "run", hub(tmp_path / "m"), CAUSAL)
    whole = open_model(in_memory(run, run / "merged")).state_dict()
    package = read_package(export_edge(run, run / "edge"))
    assert set(package.tensors) == set(whole)
    for name, tensor in tensors_of(package).items():
        assert torch.equal(tensor.to(dtype), whole[name].to(dtype)), name
        assert tensor.dtype == (dtype if tensor.dim() == 2 else torch.float32)


def test_rows_are_summed_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), CAUSAL, method="dora")
    once = read_package(export_edge(run, run / "once", quantize="int4"))
    monkeypatch.setattr("fedtune.export.merged_tensor._BLOCK", 50)  # three rows of 16
    monkeypatch.setattr("fedtune.inference.quantize.model._STRETCH", 70)
    often = read_package(export_edge(run, run / "often", quantize="int4"))
    assert all(torch.equal(tensors_of(once)[n], tensors_of(often)[n]) for n in once.tensors)


def test_shifts_are_merged_too(tmp_path: Path) -> None:
    run, live = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), CAUSAL)
    with_shifts(run, live)
    whole = open_model(in_memory(run, run / "merged")).state_dict()
    package = read_package(export_edge(run, run / "edge"))
    assert all(torch.equal(tensors_of(package)[name], whole[name]) for name in package.tensors)


def test_backbone_and_separate_adapter_equal_the_merged_weights(tmp_path: Path) -> None:
    run, live = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), CAUSAL)
    with_shifts(run, live)
    merged = read_package(export_edge(run, run / "edge"))
    package = read_package(export_edge(run, run / "apart", separate=True))
    assert list(package.adapters) == ["run"]  # the name of the experiment
    base = load_file(tmp_path / "m" / "model.safetensors")
    apart, together = tensors_of(package), tensors_of(merged)
    for module, (a, b) in package.adapters["run"].items():
        assert torch.equal(apart[f"{module}.weight"], base[f"{module}.weight"])
        torch.testing.assert_close(apart[f"{module}.weight"] + torch.from_numpy(b @ a), together[f"{module}.weight"], rtol=0, atol=1e-5)


def test_adapters_of_one_backbone_share_a_package(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m")
    run, _ = make_run(tmp_path / "one", hub(folder), CAUSAL)
    out = export_edge(run, run / "apart", separate=True)
    (out / "adapters" / "run.safetensors").rename(out / "adapters" / "first.safetensors")
    shutil.copyfile(out / "adapters" / "first.safetensors", out / "adapters" / "second.safetensors")
    assert sorted(read_package(out).adapters) == ["first", "second"]
    other, _ = make_run(tmp_path / "two", hub(checkpoint(tmp_path / "m2", seed=1)), CAUSAL)
    foreign = export_edge(other, other / "apart", separate=True)
    shutil.copyfile(foreign / "adapters" / "run.safetensors", out / "adapters" / "third.safetensors")
    with pytest.raises(ModelError, match="third.safetensors belongs to the backbone"):
        read_package(out)


@pytest.mark.parametrize("how", ["random", "loftq"])
def test_a_merge_in_memory_is_reported(tmp_path: Path, how: str) -> None:
    changes: dict[str, Any] = {"init": "random"} if how == "random" else {"precision": "int8", "compute": "fp32"}
    run, live = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m"), **changes), CAUSAL)
    if how == "loftq":
        pytest.importorskip("bitsandbytes")
        (run / "adapter" / "quantised.json").write_text('{"precision": "int8", "compute": "fp32"}')
        stored = yaml.safe_load((run / "config.yaml").read_text())
        stored["peft"]["init"] = "loftq"
        (run / "config.yaml").write_text(yaml.safe_dump(stored))
    assert "merged in memory" in read_merged(run).whole
    whole = open_model(export_hf(run, run / "merged")).state_dict()
    package = read_package(export_edge(run, run / "edge"))
    assert all(torch.equal(tensors_of(package)[n], whole[n]) for n in package.tensors)
    with pytest.raises(ModelError, match="leave out --separate"):
        export_edge(run, run / "apart", separate=True)


def test_the_engine_applies_a_separate_adapter(tmp_path: Path) -> None:
    run, live = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), CAUSAL)
    out, ids = export_edge(run, run / "apart", separate=True), token_ids(1)
    with torch.no_grad():
        torch.testing.assert_close(engine_logits(out, ids[0], "run"), live.model(ids).logits[0], rtol=0, atol=1e-4)
        with live.disabled():
            torch.testing.assert_close(engine_logits(out, ids[0]), live.model(ids).logits[0], rtol=0, atol=1e-4)


# -- virtual tokens -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["prompt", "prefix", "ptuning_v2"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_virtual_tokens_equal_the_runs_keys_and_values(tmp_path: Path, method: str, kind: str) -> None:
    config = llama_config(Qwen3Config, head_dim=4) if kind == "qwen3" else None
    run, live = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m", config=config)), CAUSAL, method=method, std=0.5)
    package = read_package(export_edge(run, run / "edge"))
    assert package.card["virtual_tokens"] == 4
    base, ids = open_model(tmp_path / "m"), token_ids(1)
    with torch.no_grad():
        wanted = live.model(ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :]
        if method == "prompt":
            embedded = torch.cat([tensors_of(package)["prompt.embeds"][None], base.get_input_embeddings()(ids)], 1)
            actual = base(inputs_embeds=embedded).logits[:, 4:]
        else:
            keys, values = (tensors_of(package)[f"prefix.{x}"].transpose(1, 2)[:, None] for x in "kv")  # [L, 1, Hkv, t, D]
            cache = DynamicCache(list(zip(keys, values, strict=True)))
            actual = base(ids, past_key_values=cache).logits  # at positions 4, 5 …
        plain = base(ids).logits
    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-5)
    assert not torch.allclose(plain, wanted, atol=1e-2)
    torch.testing.assert_close(engine_logits(package.folder, ids[0]), wanted[0], rtol=0, atol=1e-4)
    with pytest.raises(ModelError, match="leave out --separate"):
        export_edge(run, run / "apart", separate=True)
