"""HetLoRA's pruning removes only a tail that the turn reduced."""

import torch

from fedtune.clients.turns.hetlora import prune, tail_norms
from fedtune.contracts.adapter_state import AdapterSpec, AdapterState


def state(tail_a: float, tail_b: float) -> AdapterState:
    """Rank 3 on 4→2; the last rank's row of A has the norm 2·tail_a, its column of B √2·tail_b."""
    a, b = torch.ones(3, 4), torch.ones(2, 3)
    a[2], b[:, 2] = tail_a, tail_b
    tensors = {"q.lora_A": a, "q.lora_B": b, "head.weight": torch.ones(5)}
    return AdapterState(tensors, AdapterSpec(method="lora", ranks={"q": 3}, scaling={"q": 2.0}))


def test_a_smaller_tail_is_cut() -> None:
    cut = prune(state(1, 1), state(0.5, 1.5), share=0.7)  # ⌊0.7·3⌋ = 2; 0.5·1.5 = 0.75 of 1
    assert cut.spec.ranks == {"q": 2} and cut.spec.scaling == {"q": 2.0}
    assert cut["q.lora_A"].shape == (2, 4) and cut["q.lora_B"].shape == (2, 2) and torch.equal(cut["head.weight"], torch.ones(5))


def test_a_larger_tail_and_a_rank_of_one_stay() -> None:
    assert prune(state(1, 1), state(0.5, 2.5), share=0.7).spec.ranks == {"q": 3}
    assert prune(state(1, 1), state(0.5, 1.5), share=0.1).spec.ranks == {"q": 3}  # ⌊0.3⌋ = 0, but at least one rank is kept; the tail grew
    one = AdapterState({"q.lora_A": torch.ones(1, 4), "q.lora_B": torch.ones(2, 1)}, AdapterSpec(method="lora", ranks={"q": 1}))
    assert prune(one, one.replace({n: t / 2 for n, t in one.tensors.items()}), share=0.99).spec.ranks == {"q": 1}


def test_the_penalty_is_the_product_of_the_norms() -> None:
    # by hand: ‖A[2:]‖ = √(4·0.5²) = 1, ‖B[:, 2:]‖ = √(2·1.5²)
    assert torch.isclose(tail_norms(state(0.5, 1.5).tensors, {"q": 3}, 0.7), torch.tensor(2 * 1.5**2).sqrt())
