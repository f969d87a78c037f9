"""Updates for tests of strategies."""

from collections.abc import Mapping
from pathlib import Path

import torch
from flwr.app import Message
from flwr.serverapp import strategy as flower
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.contracts.plan import Update
from fedtune.strategies._flower import no_collection

SPEC = AdapterSpec(method="lora", ranks={"q": 2, "up": 1}, scaling={"q": 2.0, "up": 0.5})
SHAPES = {"q.lora_A": (2, 5), "q.lora_B": (3, 2), "up.lora_A": (1, 3), "up.lora_B": (7, 1), "head.weight": (4, 7)}


def random_adapter(seed: int, scale: float = 1.0) -> AdapterState:
    """Two LoRA modules of awkward shapes (5→3 of rank 2, 3→7 of rank 1) and a head, from a seed."""
    gen = torch.Generator().manual_seed(seed)
    return AdapterState({n: scale * torch.randn(s, generator=gen) for n, s in SHAPES.items()}, SPEC)


def plain(*values: float) -> AdapterState:
    """One tensor that is not a LoRA factor."""
    return AdapterState({"w": torch.tensor(values)}, AdapterSpec(method="bitfit"))


def update(
    client: str, adapter: AdapterState, examples: int = 1, *, metrics: dict[str, float] | None = None, **measurements: float
) -> Update:
    return Update(
        client=client, round=1, base_version=0, adapter=adapter, examples=examples, metrics=metrics or {}, measurements=measurements
    )


def close(a: AdapterState, b: AdapterState, atol: float = 1e-6) -> bool:
    return list(a.tensors) == list(b.tensors) and all(torch.allclose(a[n], b[n], rtol=0, atol=atol) for n in a.tensors)


def reload(memory: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """A memory after it is written to and read from a checkpoint."""
    save_file({n: t.contiguous() for n, t in memory.items()}, folder / "memory.safetensors")
    return load_file(folder / "memory.safetensors")


def with_other_factors(adapter: AdapterState, seed: int, size: float = 3.0) -> AdapterState:
    """The same s·B·A with other factors: (B G, G⁻¹ A) with a random invertible G for each module."""
    gen, tensors = torch.Generator().manual_seed(seed), dict(adapter.tensors)
    for module, rank in adapter.spec.ranks.items():
        g = size * torch.randn(rank, rank, generator=gen) + torch.eye(rank)
        tensors[f"{module}.lora_A"] = torch.linalg.solve(g, adapter[f"{module}.lora_A"])
        tensors[f"{module}.lora_B"] = adapter[f"{module}.lora_B"] @ g
    return adapter.replace(tensors)


def flower_result(by: flower.FedAvg, replies: list[Message], round: int = 1) -> dict[str, Tensor]:
    """The result of Flower's unmodified class for the replies."""
    with no_collection():
        record, _ = by.aggregate_train(round, replies)
    assert record is not None
    return {n: torch.tensor(a.numpy()) for n, a in record.items()}
