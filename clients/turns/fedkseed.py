"""FedKSeed's client half: MeZO's steps along directions from K common seeds. The update is K numbers.

Source: Qin et al. 2024, Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost under 18 Kilobytes, ICML
2024, arXiv:2312.06353, algorithm 1; the authors' code: zhenqincn/FedKSeed.
"""

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedtune.clients.turns._base import Turn, Work
from fedtune.clients.turns.mezo import trained, two_sided
from fedtune.config.bounds import require
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.directions import CHANCES, MOST, SINCE, SUMS, TOTAL, candidate_seeds, move, replay
from fedtune.contracts.seeds import derive_seed
from fedtune.errors import PlanError


@dataclass(kw_only=True)
class _Walk:
    """(3, K): the sum of d, the sum of clipped |d|, and the number of steps for each seed; and the generator that draws seeds."""

    sums: Tensor
    draw: random.Random
    seeds: list[int]
    chances: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class FedKSeed(Turn):
    """Rebuilds w from the run's start and the server's coefficients, then takes the plan's steps: w ← w − η·d·z_j with a drawn seed j.

    `work.start` is the run's start w_0. `work.extra` has the coefficients: `fedkseed.total` (K,), applied first, and `fedkseed.since`
    (R, K), applied row by row; and for the probability variant `fedkseed.chances` (K,). Everyone who rebuilds w gets the same bits. The
    process keeps the last w, so that a turn in the next round applies only the new rows.

    Args:
        seed: Seed of the K seeds.
        candidates: K.
        eps: ε.
        clip: Bound of |d| in the mean size that the probability variant uses.
    """

    seed: int
    candidates: int
    eps: float
    clip: float

    @property
    def passes(self) -> float:
        return 2 / 3

    @property
    def sent_bytes(self) -> int:
        return 12 * self.candidates

    def check(self) -> None:
        require("the turn's candidates", self.candidates, PlanError, ge=1, le=MOST)
        require("the turn's eps", self.eps, PlanError, gt=0)
        require("the turn's clip", self.clip, PlanError, gt=0)

    def begin(self, work: Work) -> _Walk:
        plan, seeds = work.plan, candidate_seeds(self.seed, self.candidates)
        if plan.lr != plan.lr_last or plan.weight_decay:
            raise PlanError("the turn 'fedkseed' needs a constant learning rate and no weight decay: the server's replay knows neither")
        for name, rows in ((TOTAL, 0), (SINCE, 1), (CHANCES, 0)):
            if name not in work.extra:
                continue
            shape = tuple(work.extra[name].shape)
            if work.extra[name].dtype != torch.float32:
                raise PlanError(f"the message's {name} is {work.extra[name].dtype}, wanted float32")
            if shape != (*shape[:rows], self.candidates):
                wanted = "(rounds, " if rows else "("
                raise PlanError(f"the message's {name} has the shape {shape}, wanted {wanted}{self.candidates})")
        work.live.load(rebuild(work.start, work.extra.get(TOTAL), work.extra.get(SINCE), seeds, plan.lr))
        chances = work.extra.get(CHANCES)
        if chances is not None and not (chances.isfinite().all() and (chances >= 0).all() and chances.sum() > 0):
            raise PlanError(f"the message's {CHANCES} are not weights: they must be finite and at least 0, and not all 0")
        return _Walk(
            sums=torch.zeros(3, self.candidates, dtype=torch.float64),
            draw=random.Random(derive_seed(plan.seed, "fedkseed")),
            seeds=seeds,
            chances=[] if chances is None else chances.tolist(),
        )

    def gradient(self, work: Work, memory: _Walk) -> float:
        ids = range(self.candidates)
        (j,) = memory.draw.choices(ids, weights=memory.chances) if memory.chances else (memory.draw.choice(ids),)
        with torch.no_grad():
            loss, slope = two_sided(work, memory.seeds[j], self.eps)
            move(trained(work), memory.seeds[j], -work.plan.lr * slope)
        memory.sums[:, j] += torch.tensor([slope, min(abs(slope), self.clip), 1.0], dtype=torch.float64)
        return loss

    def finish(self, work: Work, trained: AdapterState) -> AdapterState:
        return work.start.replace({SUMS: work.memory.sums.float()})


_last: dict[str, tuple[object, Tensor, AdapterState]] = {}  # the process's last w: what it was rebuilt from, its rows, and w


def rebuild(start: AdapterState, total: Tensor | None, since: Tensor | None, seeds: list[int], lr: float) -> AdapterState:
    """w = w_0 − η·Σ total_j·z_j, then for each row of `since` in order: w ← w − η·Σ row_j·z_j."""
    count = len(seeds)
    total = torch.zeros(count) if total is None else total
    since = torch.zeros(0, count) if since is None else since
    key = (start.replace(version=0).digest, seeds[0], count, lr, total.numpy().tobytes())  # the version is the round's
    known, rows, state = _last.get("w", (None, since[:0], start))
    if known != key or len(rows) > len(since) or not torch.equal(rows, since[: len(rows)]):
        rows, state = since[:0], start.replace(replay(start.tensors, total, seeds, lr))
    for row in since[len(rows) :]:
        state = state.replace(replay(state.tensors, row, seeds, lr))
    _last["w"] = key, since.clone(), state
    return state
