"""Sparse weights in place of LoRA: trained and frozen entries, and a switch to LoRA that changes no logit."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from fedtune.clients.steps import batches
from fedtune.clients.trainer import train
from fedtune.config import PeftConfig, TaskConfig
from fedtune.contracts.adapter_state import AdapterState, random_mask
from fedtune.contracts.plan import Plan, Update
from fedtune.data import Example, collate
from fedtune.errors import ModelError
from fedtune.models import LiveAdapter, initial_adapter, load_backbone, loss_sum, sparse
from fedtune.models.shift import FrozenWeights
from fedtune.models.sparse import SparseSlot
from fedtune.strategies.slora import SLoRA
from tests.models.build import checkpoint, hub, token_ids
from tests.quick import quick
from tests.working import work

CAUSAL, CLASSES = TaskConfig(kind="causal_lm", max_length=32), TaskConfig(kind="classification", max_length=32)
PEFT = PeftConfig(rank=3, alpha=12.0)
CASES = [("llama", CAUSAL), ("gpt2", CAUSAL), ("bert", CLASSES), ("albert", CLASSES)]


def make(folder: Path, kind: str = "llama", task: TaskConfig = CAUSAL, peft: PeftConfig = PEFT, **changes: Any) -> LiveAdapter:
    folder = folder if (folder / "config.json").is_file() else checkpoint(folder, kind)
    return LiveAdapter(load_backbone(hub(folder, **changes), task, num_labels=3, seed=5), peft, task)


def strategy(**changes: Any) -> SLoRA:
    return SLoRA(**{"rounds": 1, "seed": 7, "density": 0.1, **changes})


def first_state(folder: Path, task: TaskConfig, **changes: Any) -> AdapterState:
    """The initial sparse state of a server, which has no backbone."""
    initial = initial_adapter(hub(folder), task, PEFT, num_labels=3, seed=5)
    return strategy(**changes).start(initial).adapter


def perturb(state: AdapterState, *, std: float = 0.2, seed: int = 0) -> AdapterState:
    gen = torch.Generator().manual_seed(seed)
    noise = {n: t + std * torch.randn(t.shape, generator=gen) for n, t in state.tensors.items() if t.is_floating_point()}
    return state.replace({**state.tensors, **noise})


def rows(count: int, task: TaskConfig) -> list[Example]:
    ids = token_ids(count, 8, seed=3).int().numpy()
    labels = ids if task.kind == "causal_lm" else [i[:1] % 3 for i in ids]
    return [Example(input_ids=i, labels=y) for i, y in zip(ids, labels, strict=True)]


def plan(**changes: Any) -> Plan:
    values: dict[str, Any] = {"turn": "slora", "params": {"stage": "sparse"}, "steps": 3, "epochs": None, "batch_size": 4}
    values |= {"clip_norm": None}
    values |= {"lr": 1e-2, "lr_last": 1e-2}
    return Plan(round=1, client="c", base_version=0, **{**values, **changes})


def logits(live: Any) -> Tensor:
    live.model.eval()
    with torch.no_grad():
        return live.model(token_ids()).logits.clone()


def effective(linear: Any) -> Tensor:
    """The effective (out, in) matrix of a linear, from its outputs for unit vectors."""
    weight = linear.weight
    columns = weight.shape[0] if isinstance(linear, Conv1D) else weight.shape[1]
    with torch.no_grad():
        out = linear(torch.eye(columns, dtype=weight.dtype))
        zero = linear(torch.zeros(1, columns, dtype=weight.dtype))
    return (out - zero).T if linear.bias is None or not linear.bias.any() else (out.double() - zero.double()).T.to(weight.dtype)


def linears(live: LiveAdapter) -> dict[str, Any]:
    return {n: layer.get_base_layer() for n, layer in sparse.lora_layers(live.model).items()}


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_zeros_are_the_backbone_for_every_lora_state(tmp_path: Path, kind: str, task: TaskConfig) -> None:
    live = make(tmp_path / "m", kind, task)
    start = initial_adapter(hub(tmp_path / "m"), task, PEFT, num_labels=3, seed=5)
    live.load(start)
    bare = logits(live)
    filled = perturb(start)
    live.load(filled)
    adapted = logits(live)
    state = first_state(tmp_path / "m", task)
    slot = SparseSlot(live, state.spec)
    slot.load(state)
    torch.testing.assert_close(logits(slot), bare, atol=1e-5, rtol=1e-5)
    assert set(slot.parameters) == set(state.tensors) and list(slot.read(4).tensors) == list(state.tensors)
    assert all(dict(slot.model.named_parameters())[slot.names[n]] is p for n, p in slot.parameters.items())
    back = slot.read(4)
    assert back.spec.version == 4 and back.spec.mask == "7" and all(torch.equal(back[n], state[n]) for n in state.tensors)
    slot.release()
    live.load(filled)
    assert torch.equal(logits(live), adapted) and all(p.requires_grad for p in live.parameters.values())
    assert not any(n.endswith(".sparse") for n, _ in live.model.named_parameters())


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_entries_outside_the_mask_do_not_change_even_with_weight_decay(tmp_path: Path, kind: str, task: TaskConfig) -> None:
    live, state = make(tmp_path / "m", kind, task), first_state(tmp_path / "m", task)
    slot = SparseSlot(live, state.spec)
    slot.load(state)
    before = {n: p.clone() for n, p in slot.model.named_parameters() if n not in slot.names.values()}
    matrices = {n: effective(m) for n, m in linears(live).items()}
    turned = train(work(slot, rows(9, task), plan(weight_decay=0.1), task))
    assert turned.steps == 3
    assert all(torch.equal(p, before[n]) for n, p in slot.model.named_parameters() if n in before)
    for name, linear in linears(live).items():
        after, start = effective(linear).flatten(), matrices[name].flatten()
        masked = torch.zeros(len(start), dtype=torch.bool)
        masked[random_mask("7", name, len(start), len(state[f"{name}.sparse"]))] = True
        # with a bias, which is subtracted again, there is rounding; without one, none
        same = torch.equal if linear.bias is None or not linear.bias.any() else torch.allclose
        assert same(after[~masked], start[~masked])
        assert not torch.equal(after[masked], start[masked])
    changed = slot.read(1)
    assert all((changed[n] - state[n]).abs().max() > 1e-4 for n in state.tensors)


@pytest.mark.parametrize(("kind", "task"), CASES)
@pytest.mark.parametrize("mask", quick(["random", "gradient"], "gradient"))
def test_the_corrected_switch_changes_no_logit(tmp_path: Path, kind: str, task: TaskConfig, mask: str) -> None:
    if mask == "random":
        assert_switch_changes_nothing(tmp_path / "m", kind, task)
        return
    state = first_state(checkpoint(tmp_path / "m", kind), task, density=0.3)  # the same positions, but in the state
    shapes = {n: m.numel() for n, m in ((n, effective(x)) for n, x in linears(make(tmp_path / "m", kind, task)).items())}
    sent = {f"{n}.index": random_mask("x", n, size, len(state[f"{n}.sparse"])).int() for n, size in shapes.items()}
    assert_switch_changes_nothing(tmp_path / "m", kind, task, state.replace({**sent, **state.tensors}, mask=""))


def assert_switch_changes_nothing(folder: Path, kind: str, task: TaskConfig, state: AdapterState | None = None) -> None:
    live = make(folder, kind, task)
    server = strategy(mode="corrected")
    start = server.start(initial_adapter(hub(folder), task, PEFT, num_labels=3, seed=5).replace(base=live.backbone.fingerprint))
    trained = perturb(state or start.adapter).replace(base=live.backbone.fingerprint)
    slot = SparseSlot(live, trained.spec)
    slot.load(trained)
    before = logits(slot)
    slot.release()
    live.load(live.read(0).replace({n: torch.zeros_like(t) if "lora_B" in n else t for n, t in live.read(0).tensors.items()}))
    assert (logits(live) - before).abs().max() > 0.05  # the sparse stage has an effect
    begun = type(start)(adapter=trained, memory=start.memory)
    sent = trained.subset([n for n in trained.tensors if not n.endswith(".index")])
    after = server.aggregate(1, begun, iter([Update(client="c", round=1, base_version=0, adapter=sent, examples=5)]))
    frozen = FrozenWeights(live.backbone.model)
    for shift in after.shifts:
        frozen.add(shift)
    live.load(after.adapter)
    assert (logits(live) - before).abs().max() <= 1e-5


def test_the_check_of_the_switch_detects_a_transposed_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = sparse._Matrix.__init__

    def stored_orientation(self: Any, layer: Any, linear: Any) -> None:
        right(self, layer, linear)
        self._transposed = False  # as if GPT-2's layers stored (out, in)

    monkeypatch.setattr(sparse._Matrix, "__init__", stored_orientation)
    with pytest.raises((AssertionError, RuntimeError)):
        assert_switch_changes_nothing(tmp_path / "m", "gpt2", CAUSAL)


def test_every_entry_under_the_mask_is_federated_full_fine_tuning(tmp_path: Path) -> None:
    """Two clients of 9 and 5 rows, AdamW with decay, against a bare loop that trains all target weights of the bare model."""
    live, state = make(tmp_path / "m"), first_state(tmp_path / "m", CAUSAL, density=1.0)
    server, slot, updates, expected = strategy(density=1.0, rounds=20), SparseSlot(live, state.spec), [], []
    for client, count in (("a", 9), ("b", 5)):
        turn_plan = plan(weight_decay=0.1, seed=count)
        slot.load(state)
        train(work(slot, rows(count, CAUSAL), turn_plan, CAUSAL))
        updates.append(Update(client=client, round=1, base_version=0, adapter=slot.read(0), examples=count))
        bare = load_backbone(hub(tmp_path / "m"), CAUSAL).model.train()
        weights = {n: bare.get_submodule(n).weight for n in linears(live)}
        start = {n: cast(Tensor, w).detach().clone() for n, w in weights.items()}
        optimizer = torch.optim.AdamW([w.requires_grad_(True) for w in weights.values()], lr=turn_plan.lr, weight_decay=0.1)  # type: ignore[union-attr]
        order = batches(count, 4, turn_plan.seed)
        for _ in range(3):
            loss, tokens = loss_sum(bare, collate([rows(count, CAUSAL)[i] for i in next(order)], 2), CAUSAL)
            (loss / tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
        expected.append({n: (cast(Tensor, w).detach() - start[n]).double() for n, w in weights.items()})
    begun = server.start(initial_adapter(hub(tmp_path / "m"), CAUSAL, PEFT, num_labels=3, seed=5))
    after = server.aggregate(1, begun, iter(updates)).adapter
    for name in linears(live):
        mean = (9 * expected[0][name] + 5 * expected[1][name]) / 14
        assert mean.abs().max() > 1e-2
        torch.testing.assert_close(after[f"{name}.sparse"].double(), mean.flatten(), atol=1e-5, rtol=1e-4)


def test_gradients_are_those_of_the_dense_weights_with_a_shared_layer_counted_three_times(tmp_path: Path) -> None:
    live, state = make(tmp_path / "m", "albert", CLASSES), first_state(tmp_path / "m", CLASSES)
    assert len(sparse.lora_layers(live.model)) == 8  # six matrices of the layer that is used three times, and two around it
    slot = SparseSlot(live, state.spec)
    slot.load(state)
    batch = collate(rows(5, CLASSES), 1)
    loss_sum(slot.model.eval(), batch, CLASSES)[0].backward()
    bare = load_backbone(hub(tmp_path / "m"), CLASSES, num_labels=3, seed=5).model
    weights = {n: cast(Any, bare.get_submodule(n)).weight.requires_grad_(True) for n in linears(live)}
    loss_sum(bare, batch, CLASSES)[0].backward()
    for name, weight in weights.items():
        place = random_mask("7", name, weight.numel(), len(state[f"{name}.sparse"]))
        gradient = slot.parameters[f"{name}.sparse"].grad
        assert gradient is not None
        torch.testing.assert_close(gradient, weight.grad.flatten()[place], atol=1e-4, rtol=1e-4)


def test_a_bf16_backbone_trains_float32_values(tmp_path: Path) -> None:
    live = make(tmp_path / "m", precision="bf16")
    state = first_state(tmp_path / "m", CAUSAL)
    slot = SparseSlot(live, state.spec)
    slot.load(state)
    name = next(iter(linears(live)))
    before = effective(linears(live)[name])
    train(work(slot, rows(9, CAUSAL), plan(weight_decay=0.1), CAUSAL))
    after = slot.read(1)
    assert before.dtype == torch.bfloat16 and all(t.dtype == torch.float32 and t.any() for t in after.tensors.values())
    changed = (effective(linears(live)[name]) != before).flatten().nonzero().flatten()
    place = random_mask("7", name, before.numel(), len(state[f"{name}.sparse"]))
    assert len(changed) > len(place) / 2 and set(changed.tolist()) <= set(place.tolist())


def test_the_optimizer_gets_only_packed_values(tmp_path: Path) -> None:
    live, state = make(tmp_path / "m"), first_state(tmp_path / "m", CAUSAL)
    slot = SparseSlot(live, state.spec)
    slot.load(state)
    entries = sum(m.weight.numel() for m in linears(live).values())
    assert sum(p.numel() for p in slot.parameters.values()) == pytest.approx(entries / 10, abs=len(slot.parameters))
    assert [n for n, p in slot.model.named_parameters() if p.requires_grad] == list(slot.names.values())


def test_states_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    live, state = make(tmp_path / "m"), first_state(tmp_path / "m", CAUSAL)
    slot, names = SparseSlot(live, state.spec), list(state.tensors)
    some = names[0].removesuffix(".sparse")
    for bad, words in [
        (state.replace(mask="8"), "mask '8', but this slot is sparse with mask '7'"),
        (state.replace(method="lora"), "the state is lora"),
        (state.replace(base="other"), "belongs to the backbone other"),
        (state.subset(names[1:]), f"lacks '{names[0]}'"),
        (state.replace({**state.tensors, "score.weight": torch.zeros(1)}), "has 'score.weight'"),
        (state.replace({**state.tensors, names[0]: torch.zeros(10**6)}), "must be a vector of 1 to 256 values"),
    ]:
        with pytest.raises(ModelError, match=words):
            slot.load(bad)
    count = {n: len(state[n]) for n in names}
    rising = {n.replace(".sparse", ".index"): torch.arange(count[n], dtype=torch.int32) for n in names}
    sent = state.replace({**rising, **state.tensors}, mask="")
    slot = SparseSlot(live, sent.spec)
    slot.load(sent)
    for wrong in ([-1, 3], [3, 3], [0, 10**6], [5]):
        index = torch.arange(count[names[0]], dtype=torch.int32)
        index = index[:1] if len(wrong) == 1 else torch.cat([torch.tensor(wrong[:1]), index[1:-1], torch.tensor(wrong[1:])]).int()
        with pytest.raises(ModelError, match="ascending positions in a matrix of 256 entries"):
            slot.load(sent.replace({**sent.tensors, f"{some}.index": index}))


def test_another_mask_replaces_the_first_slot(tmp_path: Path) -> None:
    live, state = make(tmp_path / "m"), first_state(tmp_path / "m", CAUSAL)
    one, two = SparseSlot(live, state.spec), SparseSlot(live, state.replace(mask="8").spec)
    one.load(perturb(state))
    expected = logits(one)
    two.load(state.replace(mask="8"))
    zero = logits(two)
    one.release()  # not its values: nothing happens
    assert torch.equal(logits(two), zero) and not torch.equal(zero, expected)
    one.load(perturb(state))
    assert torch.equal(logits(one), expected)


def test_a_model_without_lora_is_refused(tmp_path: Path) -> None:
    live = make(tmp_path / "m", peft=PeftConfig(method="ia3"))
    with pytest.raises(ModelError, match="has no LoRA adapter"):
        SparseSlot(live, live.spec)
