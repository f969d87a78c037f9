"""Clients with rows of very different lengths have PEFT's gradients in a client batch, whose layers compute little padding."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.contracts.task import task_of
from fedtune.data import Example, collate
from fedtune.models import LiveAdapter, lean, loss_sum
from fedtune.models.methods import swapped
from fedtune.simulations.engines import stacked
from fedtune.simulations.engines.client_batch import ClientBatch
from tests.models import test_lean as decoders
from tests.models import test_lean_encoders as encoders

CLIENTS = {  # lengths of each client's rows
    "awkward": [[1, 9, 4], [14, 1, 2], [6]],
    "one long": [[40, 1, 1, 1], [2, 1, 3, 2], [1, 2]],
    "full group": [[13, 1, 2], [3, 1, 1], [2]],  # the first client has 16 tokens
    "equal": [[12, 12], [12, 12], [12, 12]],
}
PACKS = {"awkward": True, "one long": True, "full group": True, "equal": False}


@pytest.mark.parametrize("lengths", list(CLIENTS))
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_each_client_has_pefts_gradients(kind: str, lengths: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live, task = (decoders.live_model(tmp_path), decoders.LM) if kind == "decoder" else (encoders.encoder(tmp_path), encoders.TASK)
    rows = [decoders.ragged(some) for some in CLIENTS[lengths]]
    if kind == "encoder":
        rows = [[Example(e.input_ids % 20 + 3, np.array([i % 3])) for i, e in enumerate(some)] for some in rows]
    tall = max(map(len, rows))
    flat = [e for some in rows for e in (*some, *[some[0]] * (tall - len(some)))]  # copies of the first row do not count
    batch, real = collate(flat, 0), torch.tensor([j < len(some) for some in rows for j in range(tall)])
    task_of(task).silence(batch, ~real)
    batched = clients(live, len(rows))
    batched.rows = [len(some) for some in rows]
    lean.enable(live)
    found = decoders.packed(monkeypatch)
    with stacked.installed(live, batched) as forward:
        losses = forward(batch, task)
        (losses * real[task_of(task).counts(batch).nonzero()[:, 0]]).sum().backward()
    assert [packs for packs, *_ in found] == [PACKS[lengths]]
    lean.disable(live)
    for k, some in enumerate(rows):
        with swapped({p: batched.views[n][k].detach() for n, p in live.parameters.items()}):
            loss_sum(live.model, collate(some, 0), task)[0].backward()
        for n, p in live.parameters.items():
            got, want = batched.views[n].grad, p.grad
            assert got is not None and want is not None and (got[k] - want).norm() <= 1e-5 * want.norm(), (k, n)
            p.grad = None


def clients(live: LiveAdapter, count: int) -> ClientBatch:
    """Clients that share no tensor."""
    views: dict[str, Any] = {n: torch.stack([p.detach() * (1 + k / 4) for k in range(count)]) for n, p in live.parameters.items()}
    return ClientBatch(
        views={n: v.requires_grad_() for n, v in views.items()},
        scaling={m: torch.full((count,), s) for m, s in live.spec.scaling.items()},
        generators=[torch.Generator() for _ in range(count)],
    )
