"""Record-level privacy: DP-SGD on the tensors that a client trains.

    each step: every row is sampled independently with probability q = B / n_k (Poisson sampling)
               g ← ( Σ_i g_i · min(1, C / ‖g_i‖) + N(0, σ²C²I) ) / B            ‖·‖ over all trained tensors together

An empty sample is a step of pure noise. Later processing of g (AdamW, proximal and correction terms, the schedule) does not use rows again
and costs nothing. The adjacency is zero-out: neighboring data sets differ in one row of the client, whose gradient is replaced by zero.
This changes the sum by at most C. The row count n_k is the same for both and considered public, so q and the division by B are the same.

Source: Abadi et al. 2016, Deep Learning with Differential Privacy, arXiv:1607.00133, algorithm 1.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedtune.config import TaskConfig
from fedtune.errors import Decline
from fedtune.models import LiveAdapter
from fedtune.models.memory import is_out_of_memory
from fedtune.privacy.noise import Source

if TYPE_CHECKING:  # it loads Opacus, which counting rows does not need
    from fedtune.privacy.samples import Way


def sampling_rate(examples: int, batch: int) -> float:
    """q = B / n_k, at most 1."""
    return min(1.0, batch / examples)


def clipped_sum(grads: Mapping[str, Tensor], clip: float) -> dict[str, Tensor]:
    """Σ_i g_i · min(1, C / ‖g_i‖), float64; a row with a non-finite gradient counts as zero.

    Failing instead would disclose that row.

    Args:
        grads: Name → (B, *shape).
        clip: C.
    """
    flat = [g.flatten(1).double() for g in grads.values()]
    norms = torch.stack([g.norm(dim=1) for g in flat]).norm(dim=0)  # (B,)
    scale = torch.where(norms.isfinite(), (clip / norms).clamp(max=1.0), 0.0)
    return {n: (scale @ g.nan_to_num(0.0, 0.0, 0.0)).view(grads[n].shape[1:]) for n, g in zip(grads, flat, strict=True)}


class PrivateGradient:
    """Computes one client's noisy gradients, step by step. As a context manager, it prepares the model for per-row gradients.

    Args:
        live: The live adapter, in train mode; exactly the named tensors require gradients.
        names: The trained tensors.
        task: The task, which defines the loss.
        rows: Number of the client's rows.
        batch_of: Row numbers → their batch.
        clip: C.
        noise: σ, a multiple of C.
        batch: B, the expected rows per step.
        at_once: Most rows per pass; larger samples are split. It is halved when memory runs out.
        source: Source of sampling and noise.
        way: Method of computing per-row gradients.
    """

    def __init__(
        self, live: LiveAdapter, names: Sequence[str], task: TaskConfig, *, rows: int,
        batch_of: Callable[[Sequence[int]], Mapping[str, Tensor]], clip: float, noise: float, batch: int, at_once: int, source: Source,
        way: "Way",
    ) -> None:  # fmt: skip
        self._live, self._names, self._rows, self._batch_of = live, list(names), rows, batch_of
        self._clip, self._noise, self._source = clip, noise, source
        self.at_once, self.out_of_memory = at_once, 0
        self._ready = way(live, self._names, task)
        self.rate = sampling_rate(rows, batch)
        self._expected = self.rate * rows

    def __enter__(self) -> "PrivateGradient":
        self._grads = self._ready.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._ready.__exit__(*exc)

    def step(self) -> dict[str, Tensor]:
        """Name → the next noisy gradient at the current parameters, with their dtype and device.

        Raises:
            Decline: Memory does not suffice for a single row.
        """
        live = self._live
        chosen = self._source.chosen(self._rows, self.rate)
        total = self._total(chosen)
        std = self._noise * self._clip
        for n, t in total.items():
            t += self._source.normal(tuple(t.shape), std)
            module, _, factor = n.rpartition(".")
            if (rank := live.spec.ranks.get(module)) is not None and factor in ("lora_A", "lora_B"):
                (t[rank:] if factor == "lora_A" else t[:, rank:]).zero_()  # entries beyond the loaded rank are not parameters
        return {n: (t / self._expected).to(live.parameters[n]) for n, t in total.items()}

    def _total(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        """The clipped sum over the sample, float64. When memory runs out, the pass is repeated with half as many rows; the step's sample
        and its privacy cost do not change."""
        live, at = self._live, 0
        total = {n: torch.zeros(live.parameters[n].shape, dtype=torch.float64) for n in self._names}
        while at < len(chosen):
            rows = chosen[at : at + self.at_once]
            drawn = torch.get_rng_state()
            try:
                batch = {n: t.to(live.backbone.device) for n, t in self._batch_of(rows).items()}
                found = {n: g.cpu() for n, g in clipped_sum(self._grads(batch), self._clip).items()}
            except Exception as bad:
                if not is_out_of_memory(bad):
                    raise
                found = None  # continue outside the except clause, whose traceback keeps the tensors of the attempt alive
            if found is None:
                self._halve(len(rows))
                torch.set_rng_state(drawn)
                continue
            for n, g in found.items():
                total[n] += g
            at += len(rows)
        return total

    def _halve(self, rows: int) -> None:
        self.out_of_memory += 1
        if not (half := rows // 2):
            raise Decline("memory", "out of memory with a single row in a private turn: lower task.max_length, or take a smaller backbone")
        self.at_once = half
        if self._live.backbone.device.type == "cuda":
            torch.cuda.empty_cache()
