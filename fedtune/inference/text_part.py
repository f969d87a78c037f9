"""Names an adapter's tensors as the engine's decoder does, if it was trained on a composite model."""

from typing import TYPE_CHECKING

from fedtune.inference.engine.shape import canonical

if TYPE_CHECKING:
    from fedtune.contracts.adapter_state import AdapterState

__all__ = ["of_text_part"]


def of_text_part(state: "AdapterState") -> "AdapterState":
    """The state with the decoder's names (`model.layers.0...`) in place of those within a composite model (`model.language_model...`)."""
    return state.replace(
        {canonical(n): t for n, t in state.tensors.items()},
        ranks={canonical(m): rank for m, rank in state.spec.ranks.items()},
        scaling={canonical(m): scaling for m, scaling in state.spec.scaling.items()},
    )
