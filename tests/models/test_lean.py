"""The lean training step has the gradients of PEFT's modules."""

import dataclasses
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from fedtune.config import EngineConfig, ModelConfig, PeftConfig, TaskConfig
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.task import IGNORED, Example
from fedtune.data import collate
from fedtune.data.examples import pack, pad_id
from fedtune.experiment import simulate
from fedtune.models import Backbone, LiveAdapter, lean, load_backbone, loss_sum
from fedtune.models.lean import functions, places, step
from fedtune.models.lean.decoder import DecoderLayer
from fedtune.models.lean.layer import Pass
from fedtune.models.lean.places import Places
from fedtune.models.lean.step import LeanStep, step_of
from fedtune.models.shift import FrozenWeights
from tests.architectures import ROWS, checkpoint
from tests.quick import quick
from tests.tiny import tiny_config


@pytest.fixture(autouse=True)
def small_batches_leave_out_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "rounded", lambda n, least=1: n)


LM = TaskConfig(kind="causal_lm", max_length=16)
DECODERS = ["Llama 2", "Llama 3", "Qwen2, 2.5", "Qwen3", "Mistral", "Gemma 2", "Gemma 3", "Phi-3", "Phi-4-mini", "SmolLM3", "OLMo 2"]


def live_model(
    folder: Path, architecture: str = "Llama 2", *, model: Mapping[str, Any] | None = None, task: TaskConfig = LM, **peft: Any
) -> LiveAdapter:
    made = checkpoint(folder / "model", ROWS[architecture])
    config = ModelConfig(source="hub", name=str(made), **(model or {}))
    labels = 0 if task is LM else 3
    return with_adapter(load_backbone(config, task, num_labels=labels), task, **peft)


def with_adapter(backbone: Backbone, task: TaskConfig, **peft: Any) -> LiveAdapter:
    """The backbone with an adapter in which no tensor is zero, in training mode."""
    live = LiveAdapter(backbone, PeftConfig(**{"rank": 3, "alpha": 7.0, **peft}), task)
    generator = torch.Generator().manual_seed(1)
    for p in live.parameters.values():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    live.model.train()
    return live


def rows() -> list[Example]:
    generator = torch.Generator().manual_seed(2)
    drawn = [torch.randint(3, 200, (n,), generator=generator).int().numpy() for n in (9, 4, 12, 7)]
    return [Example(ids, ids) for ids in drawn]


def gradients(live: LiveAdapter, batch: Mapping[str, Tensor], task: TaskConfig = LM) -> dict[str, Tensor]:
    """The loss, and the gradient of each trained tensor."""
    torch.manual_seed(3)
    total, count = loss_sum(live.model, batch, task)
    (total / count).backward()
    out = {"loss": total.detach() / count} | {n: p.grad for n, p in live.parameters.items() if p.grad is not None}
    for p in live.parameters.values():
        p.grad = None
    return out


def check_gradients(live: LiveAdapter, batches: Sequence[Mapping[str, Tensor]], within: float = 1e-5, task: TaskConfig = LM) -> None:
    """Assert that the lean step has PEFT's gradients, relative to each tensor's norm."""
    want = [gradients(live, b, task) for b in batches]
    assert lean.enable(live) == "" and step_of(live.model) is not None
    for batch, right in zip(batches, want, strict=True):
        got = gradients(live, batch, task)
        assert got.keys() == right.keys() and len(got) > 1
        for name, g in right.items():
            assert g.norm() > 0 and (got[name] - g).norm() <= within * g.norm(), name


@pytest.mark.parametrize("architecture", DECODERS)
def test_gradients_of_every_architecture(architecture: str, tmp_path: Path) -> None:
    live = live_model(tmp_path, architecture)
    check_gradients(live, [collate(rows(), 0), pack(rows(), 0, 16), collate(rows()[:1], 0)])


LENGTHS = {
    "one token": [1, 9, 4],
    "one long": [14, 1, 2, 1, 3, 1],
    "little padding": [9, 9, 9, 8, 9],
    "equal": [6, 6, 6],
}


def ragged(lengths: Sequence[int]) -> list[Example]:
    """Rows of these lengths; the last has no target."""
    drawn = [torch.randint(3, 200, (n,), generator=torch.Generator().manual_seed(n)).int().numpy() for n in lengths]
    return [Example(ids, ids if i < len(lengths) - 1 else ids * 0 + IGNORED) for i, ids in enumerate(drawn)]


def packed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int, int]]:
    """Filled by later forward passes: whether padding is left out, and the number of computed and of all positions."""
    found = list[tuple[bool, int, int]]()

    class Recorder(Places):
        def __init__(self, size: torch.Size, *given: Any) -> None:
            super().__init__(size, *given)
            found.append((self.packs, len(self.pack(torch.zeros(size.numel()))), size.numel()))

    monkeypatch.setattr(step, "Places", Recorder)
    return found


@pytest.mark.parametrize("architecture", quick(["Llama 2", "Gemma 2", "Gemma 3", "OLMo 2", "Phi-3", "Qwen3"], "Llama 2", "Gemma 3"))
def test_gradients_of_ragged_rows(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = packed(monkeypatch)
    check_gradients(
        live_model(tmp_path, architecture), [collate(ragged(lengths), 0) for lengths in LENGTHS.values()], 2e-5
    )  # sums in another order
    # by hand: the tokens and one position of padding, unless less than 5 % are left out: 45 · 0.95 < 44 + 1
    assert found == [(True, 15, 27), (True, 23, 84), (False, 45, 45), (False, 18, 18)]


def test_copied_rows_of_a_client_batch_are_padding(tmp_path: Path) -> None:
    """Two clients of two rows; the second has one row, and a copy of it, which does not count."""
    live = live_model(tmp_path)
    lean.enable(live)
    found, rows = cast(LeanStep, step_of(live.model)), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]])
    chosen = found._packed({"input_ids": rows, "attention_mask": rows}, [2, 1], 1).pack(torch.arange(16))
    assert chosen.tolist() == [0, 1, 2, 4, 3, 8, 9, 10, 11]


@pytest.mark.parametrize("broken", ["neighbor", "padding"])
def test_the_check_notices_wrong_positions(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unpack = Places.unpack
    change = {
        "neighbor": lambda x: x.roll(1, 0),  # attention reads each token's neighbor, across rows
        "padding": lambda x: torch.cat([x[:-1], x[:1]]),  # a token, whose gradient is not zero, stands for padding
    }[broken]
    monkeypatch.setattr(Places, "unpack", lambda self, x: unpack(self, change(x)))
    with pytest.raises(AssertionError):
        check_gradients(live_model(tmp_path), [collate(ragged(LENGTHS["one long"]), 0)])


SETTINGS: dict[str, dict[str, Any]] = {
    "query and value": {"targets": ["q_proj", "v_proj"]},
    "down alone": {"targets": ["down_proj"]},
    "output and gate": {"targets": ["o_proj", "gate_proj"]},
    "upper layer": {"targets": ["layers.1.self_attn.k_proj", "layers.1.mlp.up_proj"]},
    "ranks": {"rank_pattern": {"q_proj": 1, "layers.1.mlp.down_proj": 5}},
    "rslora": {"method": "rslora"},
    "dora": {"method": "dora"},
    "dora, few": {"method": "dora", "targets": ["k_proj", "down_proj"]},
    "dropout": {"dropout": 0.3},
    "dropout, few": {"dropout": 0.3, "targets": ["k_proj", "v_proj", "down_proj"]},
}


@pytest.mark.parametrize("again", [False, True], ids=["kept", "again"])
@pytest.mark.parametrize("setting", list(SETTINGS))
def test_gradients_of_every_adapter(setting: str, again: bool, tmp_path: Path) -> None:
    live = live_model(tmp_path, model={"checkpointing": again}, **SETTINGS[setting])
    state = live.read(version=0)
    live.load(state.replace(scaling={m: s / 3 for m, s in state.spec.scaling.items()}))
    check_gradients(live, [collate(rows(), 0)])


@pytest.mark.parametrize("architecture", quick(["Gemma 2", "Gemma 3", "Phi-3", "OLMo 2", "Qwen3"], "Gemma 2"))
def test_gradients_with_activation_checkpointing(architecture: str, tmp_path: Path) -> None:
    check_gradients(live_model(tmp_path, architecture, model={"checkpointing": True}, dropout=0.2), [pack(rows(), 0, 16)])


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_frozen_factors_have_no_gradient(frozen: str, tmp_path: Path) -> None:
    live = live_model(tmp_path)
    for name, p in live.parameters.items():
        p.requires_grad_(not name.endswith(frozen))
    check_gradients(live, [collate(rows(), 0)])


def test_gradients_of_attention_by_the_kernel_of_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functions, "_fused", lambda q, k, cap: cap is None)
    check_gradients(live_model(tmp_path, "Qwen3"), [collate(rows(), 0), pack(rows(), 0, 16), collate(rows()[:1], 0)])


PRECISIONS = [("bf16", "bf16", 0.05), ("nf4", "fp32", 1e-5), ("nf4", "bf16", 0.05), ("int8", "fp32", 1e-5), ("int8", "bf16", 0.05)]


@pytest.mark.parametrize(("precision", "compute", "within"), quick(PRECISIONS, ("nf4", "fp32", 1e-5), ("bf16", "bf16", 0.05)))
@pytest.mark.parametrize("again", [False, True], ids=["kept", "again"])
def test_gradients_of_every_precision(
    precision: str, compute: str, within: float, again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    wide = dataclasses.replace(ROWS["Qwen2, 2.5"], config=lambda: wide_config())
    monkeypatch.setitem(ROWS, "wide", wide)
    live = live_model(tmp_path, "wide", model={"precision": precision, "compute": compute, "checkpointing": again})
    check_gradients(live, [collate(rows(), 0)], within)


def wide_config() -> Any:
    """Row lengths that are multiples of NF4's block; biases."""
    config = ROWS["Qwen2, 2.5"].config()
    config.update({"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1})
    return config


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_output_layer(tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def config() -> Any:
        made = ROWS["Llama 2"].config()
        made.tie_word_embeddings = tied
        return made

    monkeypatch.setitem(ROWS, "tied", dataclasses.replace(ROWS["Llama 2"], config=config))
    live = live_model(tmp_path, "tied")
    assert (live.backbone.model.get_output_embeddings().weight is live.backbone.model.get_input_embeddings().weight) is tied  # pyright: ignore
    check_gradients(live, [collate(rows(), 0)])


def test_a_classifier_on_a_decoder(tmp_path: Path) -> None:
    task = TaskConfig(kind="classification", max_length=16)
    live = live_model(tmp_path, "Qwen2, 2.5", task=task)
    batch = {**collate(rows(), pad_id(live.backbone.tokenizer)), "labels": torch.tensor([0, 2, 1, 0])}
    check_gradients(live, [batch], task=task)


def test_a_step_keeps_little_and_no_logits(tmp_path: Path) -> None:
    """By hand, float32 entries per token of Llama 2 with H = 48, I = 72: x, q, k, v, attention, x2 are 6 H, gate and up 2 I."""
    live, sizes = live_model(tmp_path), list[dict[int, int]]()
    for again in (False, True):
        if again:
            live.backbone.model.gradient_checkpointing_enable()
        lean.enable(live)
        kept: dict[int, int] = {}
        own = {p.untyped_storage().data_ptr() for p in live.model.parameters()}

        def keep(t: Tensor, kept: dict[int, int] = kept, own: set[int] = own) -> Tensor:
            if t.untyped_storage().data_ptr() not in own:
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            total, _ = loss_sum(live.model, collate(rows(), 0), LM)
        sizes.append(kept)
        del total
    tokens, layer = 33, 6 * 48 + 2 * 72  # 32 tokens, and a position of padding
    rest = 48 * 28 + 4 * 12 * (3 * 48 + 1) + 1000  # the loss's gradient at 28 targets; the last norm
    assert tokens * 2 * layer <= sum(sizes[0].values()) / 4 <= tokens * 2 * layer + rest
    assert tokens * 2 * 48 <= sum(sizes[1].values()) / 4 <= tokens * 2 * 48 + rest


def test_the_layers_that_compute_tensors_again_are_the_first_and_the_gradients_stay(tmp_path: Path) -> None:
    live = live_model(tmp_path, dropout=0.3)
    lean.enable(live)
    batch, found, sizes = collate(rows(), 0), list[dict[str, torch.Tensor]](), list[int]()
    for kept in (None, 2, 1, 0):
        stored: dict[int, int] = {}

        def store(t: torch.Tensor, stored: dict[int, int] = stored) -> torch.Tensor:
            stored[t.data_ptr()] = t.nbytes
            return t

        with lean.keeping(live.model, kept) as keep_none:
            torch.manual_seed(0)
            with torch.autograd.graph.saved_tensors_hooks(store, lambda t: t):
                loss = loss_sum(live.model, batch, LM)[0]
            loss.backward()
            found.append({n: cast(torch.Tensor, p.grad).clone() for n, p in live.parameters.items()})
            sizes.append(sum(stored.values()))
            live.model.zero_grad()
            assert keep_none() == (kept != 0) and not keep_none()
    assert all(torch.equal(g, found[0][n]) for grads in found for n, g in grads.items())
    assert sizes[0] == sizes[1] > sizes[2] > sizes[3] and sizes[1] - sizes[2] == sizes[2] - sizes[3]
    with lean.keeping(live.model, None) as keep_none:  # the limit ends with its context
        assert keep_none()
    lean.disable(live)
    with lean.keeping(live.model, 1) as keep_none:
        assert not keep_none()
    live = live_model(tmp_path / "again", model={"checkpointing": True})
    lean.enable(live)
    with lean.keeping(live.model, None) as keep_none:
        assert not keep_none()


def test_the_layers_share_a_block_of_memory_which_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live = live_model(tmp_path)
    lean.enable(live)
    stored = list[list[Tensor]]()

    def store(run: Pass, y: Tensor, kept: list[Tensor | None], left: int) -> tuple[Tensor, list[Tensor | None]]:
        y, kept = original(run, y, kept, left)
        stored.append([t for t in (y, *kept) if t is not None])
        return y, kept

    original, batch = Pass.store, collate(rows(), 0)
    monkeypatch.setattr(Pass, "store", store)
    inside = gradients(live, batch)
    assert [len(layer) for layer in stored] == [8, 8]  # y; and x2, q, k, v, attention, gate, up
    assert len({t.untyped_storage().data_ptr() for layer in stored for t in layer}) == 1
    del stored[:]
    with lean.keeping(live.model, 1):
        gradients(live, batch)
    assert [len(layer) for layer in stored] == [8]  # the last layer alone
    monkeypatch.setattr(Pass, "store", lambda run, y, kept, left: (y, kept))
    outside = gradients(live, batch)
    assert inside.keys() == outside.keys() and all(torch.equal(inside[n], outside[n]) for n in inside)


@pytest.mark.parametrize("kept", [None, 1])
def test_the_block_is_freed_before_layers_compute_again_and_layers_without_gradient_have_none(
    kept: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets: dict[str, Any] = {"targets": ["layers.1.self_attn.q_proj", "layers.1.mlp.down_proj"]} if kept is None else {}
    live = live_model(tmp_path, **targets)
    lean.enable(live)
    blocks, alive = list[Any](), list[bool]()

    def store(run: Pass, y: Tensor, kept: list[Tensor | None], left: int) -> tuple[Tensor, list[Tensor | None]]:
        y, kept = store_(run, y, kept, left)
        blocks.append(weakref.ref(y.untyped_storage()))
        return y, kept

    def forward(layer: Any, *given: Any, last: bool = True) -> Any:
        if not last:
            alive.append(blocks[0]() is not None)
        return forward_(layer, *given, last=last)

    store_, forward_ = Pass.store, DecoderLayer.forward
    monkeypatch.setattr(Pass, "store", store)
    monkeypatch.setattr(DecoderLayer, "forward", forward)
    with lean.keeping(live.model, kept):
        gradients(live, collate(rows(), 0))
    assert len(blocks) == 1 and alive == ([] if kept is None else [False])


def test_an_evaluation_and_a_trained_weight_use_the_models_own_modules(tmp_path: Path) -> None:
    live = live_model(tmp_path, model={"checkpointing": True})
    assert step_of(live.model) is None  # before it is enabled
    assert lean.enable(live) == "" and step_of(live.model) is not None
    with torch.no_grad():
        assert step_of(live.model) is None
    with live.disabled():
        assert step_of(live.model) is None
    frozen = live.model.get_submodule("base_model.model.model.layers.1.mlp.up_proj").base_layer.weight
    frozen.requires_grad_(True)  # as in SLoRA's search for a mask
    assert step_of(live.model) is None
    frozen.requires_grad_(False)
    forwards = [m.forward for m in live.backbone.model.model.layers]
    gradients(live, collate(rows(), 0))
    assert [m.forward for m in live.backbone.model.model.layers] == forwards
    assert all(m.gradient_checkpointing for m in live.backbone.model.model.layers)


def test_why_a_model_has_no_lean_step(tmp_path: Path) -> None:
    assert lean.enable(live_model(tmp_path / "1", "GPT-NeoX")) == "the architecture 'gpt_neox' has no lean form"
    assert lean.enable(live_model(tmp_path / "2", method="ia3")) == "peft.method=ia3 has no lean form"
    dropped = live_model(tmp_path / "5", method="dora", dropout=0.1)
    assert lean.enable(dropped) == "peft.method=dora has no lean form with peft.dropout"
    assert lean.enable(live_model(tmp_path / "3", model={"dropout": True})) == ""  # its rates are 0
    experts = lean.enable(live_model(tmp_path / "4", "Mixtral", targets=["q_proj"]))
    assert experts == "the architecture 'mixtral' has no lean form"


@pytest.mark.parametrize("layers", [0.0, 0.01], ids=["plain", "cached layers"])
def test_a_run_ends_with_the_adapter_of_pefts_modules(layers: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends, used = [], []
    monkeypatch.setattr(LeanStep, "token_losses", lambda self, *args, real=LeanStep.token_losses: used.append(1) or real(self, *args))
    for choice in ("none", "auto"):
        config = tiny_config(tmp_path, engine=EngineConfig(threads=1, batched="none", cache_layers=layers))
        config.client.lean = choice
        config.peft.dropout = 0.2
        if layers:
            config.peft.targets = ["layers.1.self_attn.q_proj", "layers.1.mlp.up_proj"]
        ends.append(AdapterState.load(simulate(config) / "adapter" / "fedtune.safetensors"))
        assert bool(used) == (choice == "auto")
    for name, tensor in ends[0].tensors.items():
        assert (ends[1][name] - tensor).norm() <= 1e-4 * tensor.norm(), name


def test_a_hook_on_a_frozen_layer_prevents_lean_steps(tmp_path: Path) -> None:
    """Shifts of quantized weights add such a hook."""
    live = live_model(tmp_path)
    lean.enable(live)
    assert step_of(live.model) is not None
    base = next(m for m in live.model.modules() if hasattr(m, "lora_A")).base_layer
    hook = cast(Any, base).register_forward_hook(lambda module, given, out: out + 1)
    assert step_of(live.model) is None
    hook.remove()
    assert step_of(live.model) is not None


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_shifts_of_quantized_weights_take_effect(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(ROWS, "wide", dataclasses.replace(ROWS["Qwen2, 2.5"], config=wide_config))
    live = live_model(tmp_path, "wide", model={"precision": precision, "compute": "fp32"})
    lean.enable(live)
    state = live.read(version=1)
    shift = state.replace({n: t + 0.1 for n, t in state.tensors.items()})
    batch, before = collate(rows(), 0), float(loss_sum(live.model, collate(rows(), 0), LM)[0])
    FrozenWeights(live.backbone.model).add(shift)
    found = float(loss_sum(live.model, batch, LM)[0])
    with torch.no_grad():
        assert found == pytest.approx(float(loss_sum(live.model, batch, LM)[0]), rel=1e-5)
    assert abs(found - before) > 1e-3


def test_code_of_a_checkpoint_and_other_attention_have_no_lean_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live = live_model(tmp_path)
    monkeypatch.setattr(type(cast(Any, live.backbone.model).model.layers[0]), "__module__", "transformers_modules.other")
    assert "has no lean form" in lean.enable(live)
    monkeypatch.undo()
    live.backbone.model.config._attn_implementation = "flex_attention"
    assert lean.enable(live) == "attn_implementation=flex_attention has no lean form"


def test_gradients_of_long_rows_by_the_fused_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functions, "SCORES", 10)
    check_gradients(live_model(tmp_path, "Qwen3"), [collate(rows(), 0), pack(rows(), 0, 16)])
