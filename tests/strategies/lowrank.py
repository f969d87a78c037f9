"""Small LoRA cohorts for the tests of the exact methods: awkward shapes, unequal counts, and the expected weights."""

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.contracts.plan import Update
from fedtune.contracts.strategy import ServerState, Strategy
from fedtune.models.shift import FrozenWeights

SHAPES = {"q": (3, 5), "up": (11, 6), "square": (8, 8)}  # module → (out, in); square: a transposition shows only in the values
HEAD = (2, 7)


def adapter(seed: int = 0, *, rank: int = 2, alpha: float = 3.0, method: str = "lora", scale: float = 1.0) -> AdapterState:
    """Random factors of every module, and a head."""
    gen = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (rows, columns) in SHAPES.items():
        tensors[f"{module}.lora_A"] = scale * torch.randn(rank, columns, generator=gen)
        tensors[f"{module}.lora_B"] = scale * torch.randn(rows, rank, generator=gen)
    tensors["score.weight"] = torch.randn(HEAD, generator=gen)
    s = alpha / (rank**0.5 if method == "rslora" else rank)
    spec = AdapterSpec(method=method, base="b" * 64, ranks=dict.fromkeys(SHAPES, rank), scaling=dict.fromkeys(SHAPES, s))
    return AdapterState(tensors, spec)


def zero_adapter(rank: int, method: str = "lora") -> AdapterState:
    """A global adapter that adds nothing to the weights: B = 0."""
    state = adapter(rank=rank, method=method)
    return state.replace({n: t * (not n.endswith("_B")) for n, t in state.tensors.items()})


def cohort(ranks: Sequence[int] = (2, 2, 2), counts: Sequence[int] = (1, 7, 40), *, seed: int = 1, alpha: float = 3.0) -> list[Update]:
    """Clients with different random factors; s_k = alpha / r_k, so clients of different ranks also differ in scaling."""
    return [
        Update(client=f"c{i}", round=1, base_version=0, adapter=adapter(seed + i, rank=r, alpha=alpha), examples=n)
        for i, (r, n) in enumerate(zip(ranks, counts, strict=True))
    ]


def in_bf16(updates: Sequence[Update]) -> list[Update]:
    """The clients' tensors after transfer in bf16."""
    return [dataclasses.replace(u, adapter=u.adapter.replace({n: t.bfloat16() for n, t in u.adapter.tensors.items()})) for u in updates]


def delta(state: AdapterState) -> dict[str, Tensor]:
    """Module → s·B·A (out, in) in float64."""
    return {m: s * state[f"{m}.lora_B"].double() @ state[f"{m}.lora_A"].double() for m, s in state.spec.scaling.items()}


def change(state: ServerState) -> dict[str, Tensor]:
    """Module → W − W0: the sum of the shifts and the adapter."""
    out = delta(state.adapter)
    for shift in state.shifts:
        for module, part in delta(shift).items():
            out[module] = out[module] + part
    return out


def mean(updates: Iterable[Update]) -> dict[str, Tensor]:
    """Module → Σ p_k s_k B_k A_k, dense and slow: the result of an exact method."""
    updates = list(updates)
    total = sum(u.examples for u in updates)
    parts = [(u.examples / total, delta(u.adapter)) for u in updates]
    return {m: torch.stack([p * d[m] for p, d in parts]).sum(0) for m in SHAPES}


def assert_equal(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, tolerance: float = 1e-6) -> None:
    """Every module is equal relative to its norm. Float32 factors are rounded, so tolerances below 1e-6 would fail."""
    assert sorted(actual) == sorted(expected)
    for module, matrix in expected.items():
        error = torch.linalg.matrix_norm(actual[module] - matrix) / torch.linalg.matrix_norm(matrix)
        assert error <= tolerance, f"{module} is off by {error:.1e}"


class Layers(nn.Module):
    """The modules of SHAPES as GPT-2's linear layers, which store W as (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        gen = torch.Generator().manual_seed(99)
        for module, (rows, columns) in SHAPES.items():
            layer = Conv1D(rows, columns)
            layer.weight.data = torch.randn(columns, rows, generator=gen)
            self.add_module(module, layer)

    def outputs(self, state: AdapterState, shifts: Iterable[AdapterState] = ()) -> dict[str, Tensor]:
        """Module → its output for a fixed input, with the adapter as PEFT computes it and with the shifted weights."""
        model = copy.deepcopy(self)
        frozen = FrozenWeights(model)
        for shift in shifts:
            frozen.add(shift)
        rank, s = state.spec.ranks["q"], state.spec.scaling["q"]
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=s * rank, target_modules=list(SHAPES), fan_in_fan_out=True), model)  # pyright: ignore[reportArgumentType]
        live = dict(model.named_parameters())
        with torch.no_grad():
            for name in state.tensors:
                module, _, factor = name.rpartition(".")
                if module in SHAPES:
                    live[f"{module}.{factor}.default.weight"].copy_(state[name])
            return {m: getattr(model, m)(torch.linspace(-1, 1, columns)[None]).double() for m, (_, columns) in SHAPES.items()}


def assert_exact_on_conv1d(strategy: Strategy) -> None:
    """The outputs of the aggregated GPT-2 layers are the mean of the clients' outputs, by PEFT's own forward pass."""
    layers, updates, start = Layers(), cohort(), strategy.start(adapter())
    after = strategy.aggregate(1, start, iter(updates))
    total = sum(u.examples for u in updates)
    each = [(u.examples / total, layers.outputs(u.adapter)) for u in updates]
    expected = {m: torch.stack([p * y[m] for p, y in each]).sum(0) for m in SHAPES}
    assert_equal(layers.outputs(after.adapter, after.shifts), expected, tolerance=2e-6)


def swap_if_square(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A mutation: A and B swapped if the shapes allow it, which transposes the matrix."""
    a, b = pair
    return (b.T, a.T) if a.shape[1] == len(b) else pair
