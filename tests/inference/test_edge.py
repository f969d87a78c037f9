import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache, MistralConfig, Qwen2Config, Qwen3Config

from fedtune.cli import main
from fedtune.config import DataConfig
from fedtune.errors import ConfigError, FedtuneError, ModelError
from fedtune.inference.edge import export_edge, told
from fedtune.inference.engine.caches.base import Span
from fedtune.inference.engine.load import load_engine
from fedtune.inference.engine.package import Package, read_package, tensor_shapes
from fedtune.inference.engine.package_writer import TensorFile
from fedtune.inference.engine.shape import Unsupported, read_shape
from fedtune.inference.export import export_hf
from fedtune.inference.measured import streamed_score
from fedtune.inference.merged import read_merged
from fedtune.inference.quantise.perplexity import of_engine, perplexity, windows
from fedtune.inference.quantise.rtn import QuantisedLinear, dequantise
from fedtune.models import LiveAdapter
from fedtune.models.backbone import quiet
from fedtune.models.checkpoint import NANO, fingerprint
from fedtune.models.shift import FrozenWeights
from fedtune.state import AdapterSpec, AdapterState
from tests.inference.test_export import ASK, CAUSAL, CLASSES, make_run
from tests.models.build import checkpoint, hub, llama_config, token_ids

ROOT = Path(__file__).parents[2]


def opened(folder: Path) -> Any:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder)


def matrix(package: Package, name: str) -> torch.Tensor:
    """A linear's weight as the package's numbers say it."""
    kept, tensors = package.linears[name], package.linear(name)
    if kept.kind in ("fp32", "bf16"):
        return tensors["weight"].float()
    parts = {k: t for k, t in tensors.items() if k != "bias"}
    return dequantise(QuantisedLinear(kind=kept.kind, group=kept.group, tensors=parts, columns=kept.shape[1], error=0.0))


# -- the merge, tensor by tensor ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "ia3", "full"])
def test_every_tensor_is_that_of_the_merge_in_memory(tmp_path: Path, method: str) -> None:
    run, _ = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), CAUSAL, method=method)
    whole = opened(export_hf(run, run / "merged")).state_dict()
    package = read_package(export_edge(run, run / "edge"))
    assert set(package.tensors) == set(whole) - {"lm_head.weight"}  # tied
    for name in package.tensors:
        assert torch.equal(package.tensors[name], whole[name]), name
    assert {x.kind for x in package.linears.values()} == {"fp32"}


def test_biases_are_trained_by_bitfit_and_scaled_by_ia3(tmp_path: Path) -> None:
    save(tmp_path / "m", llama_config(Qwen2Config))
    for method in ("bitfit", "ia3"):
        run, _ = make_run(tmp_path / method, hub(tmp_path / "m"), CAUSAL, method=method)
        whole = opened(export_hf(run, run / "merged")).state_dict()
        package = read_package(export_edge(run, run / "edge"))
        name = "model.layers.1.self_attn.v_proj.bias"
        assert torch.equal(package.linear(name.removesuffix(".bias"))["bias"], whole[name])
        assert not torch.equal(whole[name], load_file(tmp_path / "m" / "model.safetensors")[name])


def save(folder: Path, config: Any, dtype: torch.dtype = torch.float32, shard: str = "5GB") -> Path:
    """A random checkpoint of that shape, biases and norms random too."""
    checkpoint(folder)
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data.add_(0.3 * torch.randn(parameter.shape))
        os.remove(folder / "model.safetensors")
        model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


AWKWARD = {"hidden_size": 18, "intermediate_size": 37, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "vocab_size": 35}


@pytest.mark.parametrize("kind", [Qwen2Config, Qwen3Config, MistralConfig])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_awkward_shapes_in_several_shards(tmp_path: Path, kind: type, dtype: torch.dtype) -> None:
    config = llama_config(kind, **AWKWARD, tie_word_embeddings=False)
    save(tmp_path / "m", config, dtype, "8KB")
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 2
    run, _ = make_run(tmp_path / "run", hub(tmp_path / "m"), CAUSAL)
    whole = opened(export_hf(run, run / "merged")).state_dict()
    package = read_package(export_edge(run, run / "edge"))
    assert set(package.tensors) == set(whole)
    for name in package.tensors:  # float64 → bf16 once; through float32 twice, which may differ in the last bit
        tensor = package.tensors[name].float()
        torch.testing.assert_close(tensor, whole[name].float(), rtol=0 if dtype == torch.float32 else 2**-7, atol=0)
        assert package.tensors.specs[name][0] == (dtype if tensor.dim() == 2 else torch.float32)


def test_rows_are_summed_in_stretches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), CAUSAL, method="dora")
    once = read_package(export_edge(run, run / "once", quantize="int4"))
    monkeypatch.setattr("fedtune.inference.merged._STRETCH", 50)  # three rows of 16
    monkeypatch.setattr("fedtune.inference.edge._STRETCH", 70)
    often = read_package(export_edge(run, run / "often", quantize="int4"))
    assert all(torch.equal(once.tensors[n], often.tensors[n]) for n in once.tensors)


def with_shifts(run: Path, live: LiveAdapter) -> FrozenWeights:
    frozen = FrozenWeights(live.backbone.model)
    generator = torch.Generator().manual_seed(7)
    for version in (1, 2):
        spec = live.spec
        tensors = {n: torch.randn(p.shape, generator=generator) * 0.1 for n, p in live.parameters.items()}
        shift = AdapterState(tensors, AdapterSpec(method="lora", ranks=spec.ranks, scaling=spec.scaling, version=version))
        shift.save(run / "adapter" / f"shift-{version:04d}.safetensors")
        frozen.add(shift)
    return frozen


def test_shifts_are_merged_too(tmp_path: Path) -> None:
    run, live = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), CAUSAL)
    with_shifts(run, live)
    whole = opened(export_hf(run, run / "merged")).state_dict()
    package = read_package(export_edge(run, run / "edge"))
    for name in package.tensors:  # the merge in memory rounds to float32 after each of the three
        torch.testing.assert_close(package.tensors[name], whole[name], rtol=1e-6, atol=1e-6)


def test_an_adapter_that_stays_apart_adds_up_to_the_merged_weights(tmp_path: Path) -> None:
    run, live = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), CAUSAL)
    with_shifts(run, live)
    merged = read_package(export_edge(run, run / "edge"))
    package = read_package(export_edge(run, run / "apart", separate=True))
    assert list(package.adapters) == ["run"]  # the name of the experiment
    base = load_file(tmp_path / "m" / "model.safetensors")
    for module, (a, b) in package.adapters["run"].items():
        assert torch.equal(package.tensors[f"{module}.weight"], base[f"{module}.weight"])
        torch.testing.assert_close(package.tensors[f"{module}.weight"] + b @ a, merged.tensors[f"{module}.weight"], rtol=0, atol=1e-5)


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
def test_a_merge_in_memory_says_so(tmp_path: Path, how: str) -> None:
    changes: dict[str, Any] = {"init": "random"} if how == "random" else {"precision": "int8", "compute": "fp32"}
    run, live = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m"), **changes), CAUSAL)
    if how == "loftq":
        pytest.importorskip("bitsandbytes")
        (run / "adapter" / "quantised.json").write_text('{"precision": "int8", "compute": "fp32"}')
        stored = yaml.safe_load((run / "config.yaml").read_text())
        stored["peft"]["init"] = "loftq"
        (run / "config.yaml").write_text(yaml.safe_dump(stored))
    assert "merged as a whole in memory" in read_merged(run).whole
    whole = opened(export_hf(run, run / "merged")).state_dict()
    package = read_package(export_edge(run, run / "edge"))
    assert all(torch.equal(package.tensors[n], whole[n]) for n in package.tensors)
    with pytest.raises(ModelError, match="leave out --separate"):
        export_edge(run, run / "apart", separate=True)


def engine_logits(folder: Path, ids: torch.Tensor, adapter: str | None = None) -> torch.Tensor:
    engine = load_engine(folder)
    cache = engine.cache()
    engine.start(cache)
    return engine.decoder.forward(ids, [Span(cache, len(ids), keep=None, adapter=adapter)])


def test_the_engine_adds_an_adapter_that_stays_apart(tmp_path: Path) -> None:
    run, live = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), CAUSAL)
    out, ids = export_edge(run, run / "apart", separate=True), token_ids(1)
    with torch.no_grad():
        torch.testing.assert_close(engine_logits(out, ids[0], "run"), live.model(ids).logits[0], rtol=0, atol=1e-4)
        with live.disabled():
            torch.testing.assert_close(engine_logits(out, ids[0]), live.model(ids).logits[0], rtol=0, atol=1e-4)


# -- virtual tokens -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["prompt", "prefix", "ptuning_v2"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_virtual_tokens_are_what_the_run_attends_to(tmp_path: Path, method: str, kind: str) -> None:
    config = llama_config(Qwen3Config, head_dim=4) if kind == "qwen3" else None
    run, live = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m", config=config)), CAUSAL, method=method, std=0.5)
    package = read_package(export_edge(run, run / "edge"))
    assert package.card["virtual_tokens"] == 4
    base, ids = opened(tmp_path / "m"), token_ids(1)
    with torch.no_grad():
        wanted = live.model(ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :]
        if method == "prompt":
            embedded = torch.cat([package.tensors["prompt.embeds"][None], base.get_input_embeddings()(ids)], 1)
            found = base(inputs_embeds=embedded).logits[:, 4:]
        else:
            keys, values = (package.tensors[f"prefix.{x}"].transpose(1, 2)[:, None] for x in "kv")  # [L, 1, Hkv, t, D]
            cache = DynamicCache(list(zip(keys, values, strict=True)))
            found = base(ids, past_key_values=cache).logits  # at positions 4, 5 …
        plain = base(ids).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert not torch.allclose(plain, wanted, atol=1e-2)
    torch.testing.assert_close(engine_logits(package.folder, ids[0]), wanted[0], rtol=0, atol=1e-4)
    with pytest.raises(ModelError, match="leave out --separate"):
        export_edge(run, run / "apart", separate=True)


# -- quantised ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quantize", "most"), [("int8", 0.01), ("int4", 0.12)])
@pytest.mark.parametrize("tie", [True, False])
def test_quantised_weights_are_near_the_merged_ones(tmp_path: Path, quantize: str, most: float, tie: bool) -> None:
    config = llama_config(Qwen3Config, **AWKWARD, tie_word_embeddings=tie)
    run, _ = make_run(tmp_path / "run", hub(save(tmp_path / "m", config)), CAUSAL)
    exact = read_package(export_edge(run, run / "edge"))
    package = read_package(export_edge(run, run / "edge-q", quantize=quantize))
    assert package.shape.tied is False and package.linears["lm_head"].kind == "int8"
    for name, kept in package.linears.items():
        assert kept.kind == ("int8" if name == "lm_head" else quantize)
        own = "model.embed_tokens.weight" if tie and name == "lm_head" else f"{name}.weight"
        wanted = exact.tensors[own]
        assert 0 < ((matrix(package, name) - wanted).norm() / wanted.norm()).item() < most
    embedding = package.tensors["model.embed_tokens.weight"]
    assert torch.equal(embedding, exact.tensors["model.embed_tokens.weight"].bfloat16())
    figures = package.card["quantised"]
    assert figures["kind"] == quantize and figures["method"] == "rtn" and 0 < figures["weights_mean"] <= figures["weights_max"] < most
    norms = [n for n in package.tensors if "norm" in n]
    assert norms and all(torch.equal(package.tensors[n], exact.tensors[n]) for n in norms)


@pytest.mark.parametrize("tie", [True, False])
def test_the_perplexity_before_is_that_of_the_whole_model(tmp_path: Path, tie: bool) -> None:
    config = llama_config(Qwen3Config, **AWKWARD, tie_word_embeddings=tie)
    for method in ("lora", "prompt"):
        run, live = make_run(tmp_path / method, hub(save(tmp_path / f"m-{method}", config)), CAUSAL, method=method)
        ids = torch.randint(3, 35, (51,), generator=torch.Generator().manual_seed(2))
        found = streamed_score(read_merged(run), list(windows(ids, 9)))

        def logits(piece: torch.Tensor, live: LiveAdapter = live) -> torch.Tensor:
            return live.model(piece[None], attention_mask=torch.ones(1, len(piece))).logits[0, -len(piece) :]

        wanted = perplexity(logits, ids, window=9)
        assert found.tokens == wanted.tokens == 50
        assert abs(found.nats - wanted.nats) < 1e-5
        assert abs(perplexity(of_engine(load_engine(export_edge(run, run / "edge"))), ids, window=9).nats - wanted.nats) < 1e-5


TEXT = "turn on the light in a room\n\nset the heat in the kitchen to two\n\n" * 30


@pytest.mark.parametrize(("quantize", "method"), [("int4", "gptq"), ("int4", "awq"), ("int8", "smoothquant"), ("int4", "rtn")])
def test_a_calibrated_package_tells_both_perplexities(tmp_path: Path, quantize: str, method: str) -> None:
    run, _ = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), CAUSAL)
    (tmp_path / "text.txt").write_text(TEXT)
    out = export_edge(run, run / "edge", quantize=quantize, method=method, calibrate=tmp_path / "text.txt")
    package = read_package(out)
    figures = package.card["quantised"]
    found = figures["perplexity"]
    assert (figures["kind"], figures["method"], found["text"]) == (quantize, method, "calibrate")
    assert found["tokens"] > 20 and abs(math.log(found["after"] / found["before"])) < 0.5
    assert f"perplexity on {found['tokens']} held-out tokens: {found['before']:.4g} before" in told(out)
    exact = read_package(export_edge(run, run / "exact"))
    changed = not torch.equal(package.tensors["model.norm.weight"], exact.tensors["model.norm.weight"])
    assert changed == (method in ("awq", "smoothquant"))  # they fold scales into the norms


def test_without_calibration_the_run_s_own_test_is_measured_on(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": t, "client": "a"}) for t in TEXT.split("\n\n") if t))
    shutil.copyfile(rows, tmp_path / "test.jsonl")
    data = DataConfig(source="local", path=str(rows), test_path=str(tmp_path / "test.jsonl"), columns={"client": "client"})
    run, _ = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), CAUSAL, data=data)
    found = read_package(export_edge(run, run / "edge", quantize="int8")).card["quantised"]["perplexity"]
    assert found["text"] == "the run's global test" and found["before"] > 1 and found["after"] > 1
    with pytest.raises(ConfigError, match="--method gptq looks at what the layers read"):
        export_edge(run, run / "other", quantize="int8", method="gptq")
    with pytest.raises(ConfigError, match="add --quantize int8 or int4"):
        export_edge(run, run / "other", method="rtn")


# -- the card -----------------------------------------------------------------------------------------------------------------------------


def test_the_card_says_where_the_model_comes_from(tmp_path: Path) -> None:
    run, live = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), ASK)
    live.read(3).save(run / "adapter" / "fedtune.safetensors")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["privacy"] |= {"kind": "record", "delta": 1e-6}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    records = [
        {"round": 1, "client": None, "exact_match": 0.25, "loss": 2.0},
        {"round": 3, "client": "a", "epsilon": 2.5, "exact_match": 0.9},
        {"round": 3, "client": None, "exact_match": 0.5, "loss": 1.0},
        {"round": 4, "client": None, "exact_match": 0.75},  # after the adapter
    ]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + '\n{"torn')
    readme = "- privacy: (ε, δ) = (3.25, 1e-06) for the client that spent most; accountant: PRV, upper bound\n"
    (run / "adapter" / "README.md").write_text(readme)
    for source in (run, run / "adapter"):
        card = read_package(export_edge(source, tmp_path / f"out-{source.name}")).card
        assert card["task"] == "instruction" and card["max_new_tokens"] == 6 and card["base"] == live.backbone.fingerprint
        assert card["metric"] == {"name": "exact_match", "value": 0.5, "round": 3}
        unit = "one training row of a client"
        assert card["privacy"] == {"kind": "record", "unit": unit, "epsilon": 3.25, "delta": 1e-6}  # the ledgers knew of more
        assert card["provenance"] == {
            "method": "lora", "round": 3, "base": live.backbone.fingerprint, "run": "run", "name": "run", "strategy": "FedAvg",
            "rounds": 10, "clients_per_round": 10, "seed": 5, "model": "m",
        }  # fmt: skip


def test_a_bare_adapter_knows_its_round_only(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), CAUSAL)
    shutil.copytree(run / "adapter", tmp_path / "bare")
    card = read_package(export_edge(tmp_path / "bare", tmp_path / "out")).card
    assert card["metric"] is None and card["privacy"] is None and card["provenance"]["round"] == 1


# -- what is refused ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "task", "method", "error", "said"),
    [
        ("llama", CLASSES, "lora", ModelError, "is a classifier, which generates no text: export it with --to hf"),
        ("gpt2", CAUSAL, "lora", Unsupported, "does not run model_type='gpt2'"),
        ("t5", ASK, "lora", Unsupported, "does not run model_type='t5'"),
        ("llama", CAUSAL, "adapter", ModelError, "cannot run peft.method=adapter"),
    ],
)
def test_what_the_engine_does_not_run(tmp_path: Path, kind: str, task: Any, method: str, error: type, said: str) -> None:
    run, _ = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m", kind)), task, method=method)
    with pytest.raises(error, match=said):
        export_edge(run, run / "edge")
    assert not (run / "edge").exists()


def other_weights(folder: Path, **tensors: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    found = {**load_file(path), **tensors}
    save_file({n: t for n, t in found.items() if t is not None}, path, {"format": "pt"})


BAD = {
    "another backbone": (lambda r, m: checkpoint(m, seed=9), "belongs to the backbone"),
    "a weight is missing": (lambda r, m: other_weights(m, **{"model.norm.weight": None}), "'model.norm.weight' is missing from"),
    "another shape": (lambda r, m: other_weights(m, **{"model.norm.weight": torch.ones(7)}), "'model.norm.weight' has another shape in"),
    "integers": (lambda r, m: other_weights(m, **{"model.norm.weight": torch.ones(16, dtype=torch.int32)}), "is I32, wanted numbers"),
    "no adapter": (lambda r, m: shutil.rmtree(r / "adapter"), "has no adapter/ yet"),
    "metrics": (lambda r, m: (r / "metrics.jsonl").write_text("{]\n{}\n"), "metrics.jsonl line 1 is damaged"),
    "taken": (lambda r, m: (r / "edge").mkdir() or (r / "edge" / "x").write_text(""), "exists already"),
    "no tokenizer": (lambda r, m: [os.remove(f) for f in m.glob("token*")], "has no tokenizer"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_sentence_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    run, _ = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), CAUSAL)
    spoil, said = BAD[name]
    spoil(run, tmp_path / "m")
    with pytest.raises(FedtuneError, match=said) as bad:
        export_edge(run, run / "edge")
    assert "\n" not in str(bad.value)
    assert not list(run.glob(".*")) and (name == "taken" or not (run / "edge").exists())


def test_an_adapter_of_another_shape_is_named(tmp_path: Path) -> None:
    run, live = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), CAUSAL)
    name = "model.layers.1.mlp.down_proj"
    state = live.read(1)
    state.replace({**state.tensors, f"{name}.lora_A": torch.ones(3, 5)}).save(run / "adapter" / "fedtune.safetensors")
    with pytest.raises(ModelError, match=rf"'{name}.weight' is \(16, 5\), the backbone's \(16, 24\)"):
        export_edge(run, run / "edge")


# -- the command --------------------------------------------------------------------------------------------------------------------------


def test_the_command_writes_every_format_and_says_what_there_is_to_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nano_tokenizer(checkpoint(tmp_path / "m", config=llama_config(vocab_size=1024), seed=2))
    run, _ = make_run(tmp_path / "run", hub(model), CAUSAL)
    (tmp_path / "text.txt").write_text(TEXT)
    for arguments, name, said in [
        ([], "merged", ""),
        (["--to", "edge"], "edge", ""),
        (["--to", "edge", "--quantize", "int4", "--method", "gptq", "--calibrate", str(tmp_path / "text.txt")], "edge-int4",
         "quantised to int4 by gptq: the weights are off by"),
        (["--to", "gguf"], "model-f16.gguf", ""),
    ]:  # fmt: skip
        assert main(["export", str(run), *arguments]) == 0
        out, err = capsys.readouterr()
        assert out.strip() == str(run / name) and (run / name).exists()
        assert said in err and bool(err) == bool(said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--quantize", "int8"], "--quantize goes with --to edge, not with --to hf"),
        (["--to", "gguf", "--separate"], "--separate goes with --to edge, not with --to gguf"),
        (["--to", "edge", "--gguf-type", "q8_0"], "--gguf-type goes with --to gguf, not with --to edge"),
        (["--to", "edge", "--requantize"], "--requantize goes with --to hf"),
        (["--to", "edge", "--quantize", "int4", "--method", "smoothquant", "--calibrate", "x"], "smoothquant makes activations fit int8"),
        (["--to", "edge", "--method", "rtn"], "--method rtn needs --quantize"),
        (["--to", "edge", "--quantize", "int4", "--method", "gptq"], "--method gptq needs text"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert main(["export", str(tmp_path), *arguments]) == 2
    assert said in capsys.readouterr().err


# -- memory -------------------------------------------------------------------------------------------------------------------------------

SIZES = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 4,
         "vocab_size": 16000, "max_position_embeddings": 256, "tie_word_embeddings": False}  # fmt: skip
PEAK = """
import resource, sys, threading
from pathlib import Path
import torch
torch.set_num_threads(1)
from fedtune.inference.edge import export_edge, told
from fedtune.inference.engine.caches.base import Span
from fedtune.inference.engine.load import load_engine
from fedtune.inference.gguf import export_gguf

def do(run, out):
    if sys.argv[3] == "gguf":
        export_gguf(run, out, kind="q8_0")
    else:
        export_edge(run, out, quantize=None if sys.argv[3] == "plain" else sys.argv[3], separate=len(sys.argv) > 4)

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:"))

do(Path(sys.argv[1]), Path(sys.argv[1]) / "warm")  # so that what is loaded late counts for nothing
open("/proc/self/clear_refs", "w").write("5")
before = peak()
do(Path(sys.argv[2]), Path(sys.argv[2]) / "out")
print((peak() - before) * 1024)
"""


def nano_tokenizer(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(NANO / name, folder / name)
    return folder


def big_checkpoint(folder: Path, shard: int) -> int:
    """A bfloat16 checkpoint of 160 MB whose weights are nothing in particular, in shards; returns the largest's bytes."""
    checkpoint(folder, config=llama_config())
    os.remove(folder / "model.safetensors")
    nano_tokenizer(folder)
    config = llama_config(**SIZES)
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), "dtype": "bfloat16", "architectures": ["LlamaForCausalLM"]}))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, size in tensor_shapes(read_shape(config.to_dict())):
        if shards[-1] and sum(2 * math.prod(s) for s in shards[-1].values()) + 2 * math.prod(size) > shard:
            shards.append({})
        shards[-1][name] = size
    where = {}
    for i, mine in enumerate(shards):
        file = TensorFile(folder / f"model-{i}.safetensors", {n: (torch.bfloat16, s) for n, s in mine.items()})
        for name, size in mine.items():
            file.put(name, torch.randn(size, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(i)) * 0.02)
            where[name] = f"model-{i}.safetensors"
        file.close()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return max((folder / name).stat().st_size for name in set(where.values()))


@pytest.mark.slow
def test_an_export_needs_little_more_than_a_shard(tmp_path: Path) -> None:
    small, _ = make_run(tmp_path / "small", hub(nano_tokenizer(checkpoint(tmp_path / "s", config=llama_config(vocab_size=1024)))), CAUSAL)
    largest = big_checkpoint(tmp_path / "m", 64 << 20)
    config = yaml.safe_load((small / "config.yaml").read_text())
    big = tmp_path / "big"
    (big / "adapter").mkdir(parents=True)
    config["model"]["name"] = str(tmp_path / "m")
    (big / "config.yaml").write_text(yaml.safe_dump(config))
    modules = {n.removesuffix(".weight"): s for n, s in tensor_shapes(read_shape(llama_config(**SIZES).to_dict())) if "_proj" in n}
    factors = {f"{m}.lora_{x}": torch.full((8, s[1]) if x == "A" else (s[0], 8), 0.01) for m, s in modules.items() for x in "AB"}
    spec = AdapterSpec(
        method="lora", base=fingerprint(tmp_path / "m"), ranks=dict.fromkeys(modules, 8), scaling=dict.fromkeys(modules, 2.0)
    )
    AdapterState(factors, spec).save(big / "adapter" / "fedtune.safetensors")
    del factors
    for how in (["plain"], ["int8"], ["int4"], ["plain", "separate"], ["gguf"]):
        said = subprocess.run([sys.executable, "-c", PEAK, small, big, *how], capture_output=True, text=True, check=True, cwd=ROOT)
        grown = int(said.stdout)
        print(how, f"{grown / 1e6:.0f} MB for shards of {largest / 1e6:.0f} MB")
        assert grown <= 1.3 * largest  # the output's 160 MB are not even counted
        for made in (big / "out", small / "warm"):
            made.unlink() if made.is_file() else shutil.rmtree(made)
