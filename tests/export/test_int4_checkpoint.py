"""GPTQ and AWQ checkpoints, unpacked by a second reader that follows the formats' descriptions number by number."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils.quantization_config import AwqConfig, GPTQConfig

from fedtune.cli.main import main
from fedtune.errors import ModelError
from fedtune.export.int4_checkpoint import export_int4_checkpoint
from fedtune.inference import generate_text
from fedtune.inference.engine.gptq_awq import pack_codes, unpack_weight
from fedtune.inference.engine.gptq_config import Packing, split_config
from fedtune.inference.engine.load import load_engine
from fedtune.inference.quantize import model as quantizer
from fedtune.inference.quantize.perplexity import of_engine
from fedtune.inference.quantize.rtn import QuantizedLinear, dequantize, fit_grid, quantize_rtn
from fedtune.models.backbone import quiet
from tests.export.test_huggingface import CAUSAL, make_run
from tests.models.build import checkpoint, hub, llama_config, token_ids

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 160, "initializer_range": 0.15, "num_hidden_layers": 1}
TEXT = "turn on the light in the kitchen and set heat up to two in one bed room lamp off " * 40
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # columns in the order of their four bits, lowest first


def unpack_by_hand(to: str, tensors: dict[str, torch.Tensor], name: str) -> np.ndarray:
    """W [out, in] as float64, unpacked code by code."""
    packed, zeros, scales = (tensors[f"{name}.{part}"].numpy() for part in ("qweight", "qzeros", "scales"))
    words, zero_words = packed.view(np.uint32), zeros.view(np.uint32)
    groups, rows = scales.shape
    columns = packed.shape[0] * (8 if to == "gptq" else 1)
    out = np.empty((rows, columns))
    for column in range(columns):
        group = int(tensors[f"{name}.g_idx"][column]) if to == "gptq" else column // (columns // groups)
        for row in range(rows):
            place = row % 8 if to == "gptq" else AWQ_ORDER.index(row % 8)
            zero = zero_words[group, row // 8] >> 4 * place & 15
            if to == "gptq":
                code, zero = words[column // 8, row] >> 4 * (column % 8) & 15, zero + 1
            else:
                code = words[column, row // 8] >> 4 * place & 15
            out[row, column] = (int(code) - int(zero)) * float(scales[group, row])
    return out


def run_of(folder: Path, kind: type = LlamaConfig, **changes: Any) -> Path:
    model = checkpoint(folder / "m", config=llama_config(kind, **{**SIZES, **changes}))
    (folder / "text.txt").write_text(TEXT)
    return make_run(folder / "run", hub(model), CAUSAL, std=0.05)[0]


def record_tensors(patch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Tensor name → the quantizer's result, dequantized."""
    out, plain = dict[str, torch.Tensor](), quantizer.quantize_model

    def spy(*args: Any, **more: Any) -> Any:
        for name, made in plain(*args, **more):
            out[name] = dequantize(made) if isinstance(made, QuantizedLinear) else made
            yield name, made

    patch.setattr("fedtune.export.int4_checkpoint.quantize_model", spy)
    return out


KINDS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "mistral": MistralConfig}


SLOW = [pytest.param(to, kind, marks=pytest.mark.slow) for to, kind in (("gptq", "llama"), ("gptq", "qwen3"), ("awq", "mistral"))]


@pytest.mark.parametrize(("to", "kind"), [("awq", "qwen2"), *SLOW])
def test_the_file_holds_what_the_quantizer_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: Any, kind: str) -> None:
    run, chosen = run_of(tmp_path, KINDS[kind], tie_word_embeddings=kind != "llama"), record_tensors(monkeypatch)
    out = export_int4_checkpoint(run, tmp_path / "out", to=to, calibrate=tmp_path / "text.txt")
    tensors = load_file(out / "model.safetensors")
    linears = {name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")}
    assert len(linears) == 7
    for name, want in chosen.items():
        if (stem := name.removesuffix(".weight")) in linears:
            np.testing.assert_array_equal(unpack_by_hand(to, tensors, stem), want.double().numpy())
        else:
            assert torch.equal(tensors[name], want.half())
    assert ("lm_head.weight" in tensors) == (kind == "llama") and tensors["model.embed_tokens.weight"].dtype == torch.float16
    scales = tensors["model.layers.0.mlp.down_proj.scales"]
    assert scales.shape == (160 // 32, 64) and scales.dtype == torch.float16  # 160 columns: groups of 32
    if to == "gptq":
        # zero points are 8, stored minus 1
        assert set(tensors["model.layers.0.self_attn.q_proj.qzeros"].flatten().tolist()) == {0x77777777}
        assert tensors["model.layers.0.mlp.down_proj.g_idx"].tolist() == [i // 32 for i in range(160)]


@pytest.mark.slow
@pytest.mark.parametrize("to", ["gptq", "awq"])
def test_transformers_and_the_command_line_read_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str], to: Any) -> None:
    run = run_of(tmp_path, hidden_size=128, intermediate_size=256)
    assert main(["export", str(run), "--to", to, "--calibrate", str(tmp_path / "text.txt")]) == 0
    out, err = capsys.readouterr()
    assert Path(out.strip()) == run / to and f"quantized to int4 by {to}: the relative error of the weights is" in err
    assert "held-out tokens" in err
    config = AutoConfig.from_pretrained(run / to)
    assert config.dtype == torch.float16 and config.architectures == ["LlamaForCausalLM"]
    found: Any = AutoQuantizationConfig.from_dict(config.quantization_config)
    assert type(found) is (GPTQConfig if to == "gptq" else AwqConfig)
    assert (found.bits, found.group_size, found.desc_act, found.format) == (4, 128, False, "gptq" if to == "gptq" else "gemm")
    assert getattr(found, "sym" if to == "gptq" else "zero_point") is True
    own = json.loads((run / to / "config.json").read_text())["quantization_config"]
    assert own["quant_method"] == to and own["checkpoint_format" if to == "gptq" else "version"] == ("gptq" if to == "gptq" else "gemm")
    card = json.loads((run / to / "fedtune.json").read_text())
    assert card["quantised"]["group"] == 128 and card["quantised"]["perplexity"]["text"] == "calibrate"


BIASES = {"attention_bias": True, "mlp_bias": True}
OTHERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, BIASES),
    "gemma2": (Gemma2Config, {"head_dim": 16}),
    "gemma3": (Gemma3TextConfig, {"head_dim": 16, "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}),
    "phi3": (Phi3Config, {"pad_token_id": 1}),
    "olmo2": (Olmo2Config, {}),
}
MORE = [pytest.param(to, kind, marks=pytest.mark.slow) for kind in OTHERS for to in ("gptq", "awq") if (to, kind) != ("gptq", "llama")]


@pytest.mark.parametrize(("to", "kind"), [("gptq", "llama"), *MORE])
def test_the_engine_reads_the_folder(tmp_path: Path, to: Any, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its logits equal those of transformers with the weights that the second reader unpacks."""
    run = run_of(tmp_path, OTHERS[kind][0], **OTHERS[kind][1])
    out = export_int4_checkpoint(run, tmp_path / "out", to=to, calibrate=tmp_path / "text.txt")
    tensors = load_file(out / "model.safetensors")
    stems = {name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")}
    plain = {name: t.float() for name, t in tensors.items() if name.endswith((".weight", ".bias"))}
    plain |= {f"{stem}.weight": torch.tensor(unpack_by_hand(to, tensors, stem)).float() for stem in stems}
    config = {k: v for k, v in json.loads((out / "config.json").read_text()).items() if k != "quantization_config"} | {"dtype": "float32"}
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    save_file(plain, tmp_path / "plain/model.safetensors", {"format": "pt"})
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    ids = token_ids()[0]
    torch.testing.assert_close(of_engine(load_engine(out, "fp32"))(ids), model(ids[None]).logits[0], rtol=0, atol=1e-5)
    assert kind != "llama" or generate_text(out, "turn on", max_new_tokens=4) and "transformers" not in capsys.readouterr().err
    with pytest.raises(ModelError, match="in 4 bits, and int8 would round it again: export the model with --to edge"):
        load_engine(out, "int8", keep=False)


@pytest.mark.slow
def test_quantization_keeps_the_model(tmp_path: Path) -> None:
    """The folder's perplexity is near the model's, and AWQ's folds change only the rounding."""
    run = run_of(tmp_path, num_hidden_layers=3)
    for to in ("gptq", "awq"):
        out = export_int4_checkpoint(run, tmp_path / to, to=to, calibrate=tmp_path / "text.txt")
        found = json.loads((out / "fedtune.json").read_text())["quantised"]
        assert 0.02 < found["weights_mean"] < 0.15
        assert found["perplexity"]["after"] == pytest.approx(found["perplexity"]["before"], rel=0.2)
    assert (tmp_path / "awq/model.safetensors").stat().st_size < 0.5 * (tmp_path / "m/model.safetensors").stat().st_size


def test_grids_by_hand() -> None:
    """A group from -3 to 1.5, and one of positive numbers; the other numbers of a row of 32 are 0."""
    row = torch.zeros(1, 64)
    row[0, :3], row[0, 32:34] = torch.tensor([-3.0, 1.5, 0.25]), torch.tensor([1.0, 1.5])
    grid, codes = quantize_rtn(row, "int4z", 32)
    # step (1.5 + 3) / 15 = 0.3; z = 3 / 0.3 = 10: -3 → 0, 1.5 → 15, 0.25 → 10 + 1; the second step is 0.1, z = 0: 1 → 10, 1.5 → 15
    assert (codes + 8)[0, [0, 1, 2, 3, 32, 33, 34]].tolist() == [0, 15, 11, 10, 10, 15, 0]
    assert grid.values(codes)[0, 3] == 0 and grid.values(codes)[0, 34] == 0  # zero is exact
    symmetric, codes = quantize_rtn(row, "int4s", 32)
    # step 3 / 7.5 = 0.4: 1.5 → 8 + 3.75 → 12, 0.25 → 8 + 0.625 → 9; the second step is 0.2: 1 → 13, 1.5 → 15.5 → 15
    assert (codes + 8)[0, [1, 2, 3, 32, 33]].tolist() == [12, 9, 8, 13, 15] and not symmetric.zero.any()
    assert torch.equal(symmetric.scale, torch.tensor([[0.4, 0.2]]).half().float())
    for sign in (1, -1):  # a group of one sign: z is a code, so the grid begins or ends at 0
        above = sign * torch.linspace(2, 4.5, 32)[None]
        grid, codes = quantize_rtn(above, "int4z", 32)
        assert (grid.values(codes) - above).abs().max() < 0.151  # half of 4.5 / 15
    with pytest.raises(ModelError, match="beyond the range of float16 scales: use --to edge"):
        fit_grid(torch.full((1, 32), 1e6), "int4s", 32)


@pytest.mark.parametrize(
    "packing", [Packing(format="gptq", group=8, offset=1), Packing(format="gptq", group=-1), Packing(format="awq", group=16)]
)
def test_packing_is_undone(packing: Packing) -> None:
    generator = torch.Generator().manual_seed(0)
    groups = 1 if packing.group == -1 else 48 // packing.group
    codes, zero = (torch.randint(16, (24, n), generator=generator, dtype=torch.uint8) for n in (48, groups))
    scale = torch.rand(24, groups, generator=generator).half()
    tensors = pack_codes(packing, codes, scale, zero)
    want = (codes.float() - zero.float().repeat_interleave(48 // groups, 1)) * scale.float().repeat_interleave(48 // groups, 1)
    assert torch.equal(unpack_weight(packing, tensors.__getitem__, (24, 48), "w"), want)
    if packing.format == "gptq":  # checkpoints of other programs, which may reorder columns
        order = torch.randperm(48, generator=generator)
        mixed = pack_codes(packing, codes[:, order], scale, zero) | {"g_idx": tensors["g_idx"][order]}
        assert torch.equal(unpack_weight(packing, mixed.__getitem__, (24, 48), "w"), want[:, order])


def change(name: str, make: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[dict[str, torch.Tensor]], None]:
    def apply(tensors: dict[str, torch.Tensor]) -> None:
        if (made := make(tensors.pop(name))) is not None:
            tensors[name] = made

    return apply


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (change(f"{Q}.scales", lambda t: None), "scales' is missing"),
        (change(f"{Q}.qzeros", lambda t: t[:, :-1].contiguous()), "qzeros' is"),
        (change(f"{Q}.qweight", lambda t: t.float()), "qweight' is"),
        (change(f"{Q}.g_idx", lambda t: t + 100), "names a group beyond 2"),
        (change(f"{Q}.g_idx", lambda t: t - 1), "names a group beyond 2"),
    ],
)
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, damage: Callable[[dict[str, torch.Tensor]], None], says: str) -> None:
    out = export_int4_checkpoint(run_of(tmp_path), tmp_path / "out", to="gptq", calibrate=tmp_path / "text.txt")
    tensors = load_file(out / "model.safetensors")
    damage(tensors)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=says):
        load_engine(out)


def test_other_quantizations_are_left_to_transformers() -> None:
    four = {"bits": 4, "group_size": 128}
    for own in ({"quant_method": "gptq", **four, "bits": 8}, {"quant_method": "awq", **four, "version": "gemv"},
                {"quant_method": "bitsandbytes"}, {"quant_method": "gptq", "bits": 4}, "x"):  # fmt: skip
        assert split_config({"a": 1, "quantization_config": own})[1] is None
    assert split_config({"a": 1, "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": -1}}) == (
        {"a": 1}, Packing(format="gptq", group=-1, offset=1)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"intermediate_size": 88}, r"down_proj.weight' is \(64, 88\), but GPTQ needs multiples of 8 and 32: use --to edge"),
     ({"intermediate_size": 100}, r"'model.layers.0.mlp.gate_proj.weight' is \(100, 64\), but GPTQ needs multiples of 8 and 32")],
)  # fmt: skip
def test_sizes_that_do_not_pack_are_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        export_int4_checkpoint(run_of(tmp_path, **changes), tmp_path / "out", to="gptq", calibrate=tmp_path / "text.txt")
    assert not (tmp_path / "out").exists()
