"""Unmerged LoRA factors, selected per span."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fedtune.errors import ModelError
from fedtune.inference.engine.rope import pairs
from fedtune.inference.engine.shape import Shape

# module of a layer → the engine's fused linear
_HOME = {
    "self_attn.q_proj": "qkv",
    "self_attn.k_proj": "qkv",
    "self_attn.v_proj": "qkv",
    "self_attn.o_proj": "o",
    "mlp.gate_proj": "gate_up",
    "mlp.up_proj": "gate_up",
    "mlp.down_proj": "down",
}


@dataclass(slots=True)
class Lora:
    """One adapter: (layer, linear) → pieces (aᵀ [K, r], bᵀ [r, n], the first of its n output columns)."""

    pieces: dict[tuple[int, str], list[tuple[Tensor, Tensor, int]]] = field(default_factory=dict)

    def add(self, where: tuple[int, str], x: Tensor, y: Tensor) -> None:
        """y += x aᵀ bᵀ, in place; x [n, K], y [n, N]."""
        for a, b, column in self.pieces.get(where, ()):
            y[:, column : column + b.shape[1]].addmm_(x @ a, b)


def make_lora(shape: Shape, factors: Mapping[str, tuple[Tensor, Tensor]], name: str) -> Lora:
    """Build an adapter from its modules' factors.

    Args:
        shape: The model's shape.
        factors: Module, such as `model.layers.0.self_attn.q_proj` → A [r, K] with the scaling s multiplied in, and B [N, r].
        name: The adapter's name, for error sentences.

    Raises:
        ModelError: The engine does not support adapters on a module, or factors do not fit it.
    """
    q, kv, inner, d = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.intermediate, shape.hidden
    sizes = {"q": (q, d, 0), "k": (kv, d, q), "v": (kv, d, q + kv), "o": (d, q, 0)}
    sizes |= {"gate": (inner, d, 0), "up": (inner, d, inner), "down": (d, inner, 0)}
    lora = Lora()
    for module, (a, b) in factors.items():
        layer, _, own = module.removeprefix("model.layers.").partition(".")
        if not layer.isdecimal() or int(layer) >= shape.layers or own not in _HOME or not module.startswith("model.layers."):
            raise ModelError(f"adapter {name!r} changes '{module}', which the engine cannot adapt: merge it with `fedtune export`")
        part = own.rpartition(".")[2].removesuffix("_proj")
        rows, columns, first = sizes[part]
        if a.dim() != 2 or a.shape[1] != columns or b.shape != (rows, a.shape[0]):
            raise ModelError(f"adapter {name!r} does not fit '{module}' of shape {(rows, columns)}: it belongs to another model")
        b = b.float()
        if part in "qk":
            b = b[pairs(rows // shape.head_dim, shape.head_dim)]
        lora.pieces.setdefault((int(layer), _HOME[own]), []).append((a.float().T.contiguous(), b.T.contiguous(), first))
    return lora


def add_all(loras: Sequence[tuple[slice, Lora]], where: tuple[int, str], x: Tensor, y: Tensor) -> None:
    """Apply each adapter to its rows of y, in place."""
    for rows, lora in loras:
        lora.add(where, x[rows], y[rows])
