"""FedPepTAO's two measurements: how redundant each layer of the backbone is, and which share of the prompts matters.

Redundancy, of the bare backbone on a batch of the client's: for the hidden output X (rows, T·H) of a layer and the eigenvalues λ of the
rows' cosine Gram matrix, s = Σ_i [log λ_i + 1/λ_i] with 1e-5 added to each λ. Orthogonal rows give one a row, rows that are nearly alike
some 1e5 a row: the higher, the more redundant.

Share: Lanczos gives the spectral density of the Hessian of the loss with regard to all prompts; ρ(t) = 1 − mass(λ ≤ t). From t = 0, t goes
up until ρ has settled.

Source: Che et al. 2023, arXiv:2310.15080, section 4.2. The form of the score is that of Mellor et al. 2021, Neural Architecture Search
without Training, arXiv:2006.04647. The density is estimated by stochastic Lanczos quadrature as Yao et al. 2020, PyHessian: Neural Networks
Through the Lens of the Hessian, arXiv:1912.07145, do: one random vector, Gaussians of variance 1e-5·max(1, range).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from fedtune.clients.steps import batches
from fedtune.clients.turns._base import Turn, Work
from fedtune.config import TaskConfig
from fedtune.config.bounds import require
from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.contracts.seeds import derive_seed
from fedtune.contracts.task import task_of
from fedtune.data import collate
from fedtune.errors import ModelError, PlanError, UpdateError
from fedtune.models import LiveAdapter, loss_sum

_FLOOR = 1e-5
STEPS = 50  # of Lanczos
_STEP, _SETTLED, _SUCCESSIVE = 0.1, 0.005, 3
_VARIANCE = 1e-5


@dataclass(frozen=True, kw_only=True)
class FedPepTAO(Turn):
    """Measures on `plan.batch_size` rows, drawn by `plan.seed` (all of them, where there are fewer); trains nothing.

    Args:
        stage: `layers`: the redundancy of each layer; `hessian`: the share of the prompts that matters.
    """

    stage: str

    def check(self) -> None:
        require("the turn's stage", self.stage, PlanError, choices=("layers", "hessian"))

    @property
    def trains(self) -> bool:
        return False

    def observe(self, work: Work) -> AdapterState:
        live = work.live
        if not isinstance(live, LiveAdapter):
            raise PlanError("the plan asks for a measurement of the sparse stage: the turn 'fedpeptao' looks at an adapter of peft.method")
        rows = next(batches(len(work.examples), work.plan.batch_size, work.plan.seed))
        batch = {k: v.to(live.backbone.device) for k, v in collate([work.examples[i] for i in rows], work.pad_id).items()}
        if self.stage == "layers":
            found = {"layers": layer_scores(live, batch, work.task)}
        else:
            found = {"ratio": prompt_share(live, batch, work.task, derive_seed(work.plan.seed, "lanczos"))}
        return AdapterState(found, AdapterSpec(method="scores", base=live.spec.base, version=work.plan.base_version))


def layer_scores(live: LiveAdapter, batch: Mapping[str, Tensor], task: TaskConfig) -> Tensor:
    """The redundancy of each layer, (L,) float64.

    Raises:
        ModelError: The backbone hands out another number of layers than the adapter has prompts.
    """
    model = live.backbone.model
    training = model.training
    model.eval()
    try:
        with live.disabled():
            hidden = hidden_outputs(model, batch, task)
    finally:
        model.train(training)
    prompts = sum(n.endswith(".prompt") for n in live.parameters)
    if len(hidden) != prompts:
        raise ModelError(
            f"the backbone hands out the output of {len(hidden)} layers, the adapter has {prompts} prompts: set peft=ptuning_v2"
        )
    return torch.tensor([redundancy(h) for h in hidden], dtype=torch.float64)


def prompt_share(live: LiveAdapter, batch: Mapping[str, Tensor], task: TaskConfig, seed: int) -> Tensor:
    """The share of the prompts that matters, (1,) float64.

    Costs the graph of one batch, STEPS second derivatives, and memory for STEPS vectors as long as all prompts together.

    Raises:
        ModelError: The adapter has no prompts.
        UpdateError: The curvature is not finite.
    """
    params = [p for n, p in live.parameters.items() if n.endswith(".prompt")]
    if not params:
        raise ModelError(f"the curvature of prompts is asked for, the adapter's method is '{live.spec.method}': set peft=ptuning_v2")
    training = live.model.training
    live.model.eval()
    try:
        # fused attention has no second derivative; torch's own composition has one, whatever the model's attention is built of
        with sdpa_kernel(SDPBackend.MATH):
            loss, count = loss_sum(live.model, batch, task)
            times = hessian_product(loss / max(count, 1), params)
            signs = torch.randint(0, 2, (sum(p.numel() for p in params),), generator=torch.Generator().manual_seed(seed)) * 2 - 1
            values, weights = spectrum(times, signs.to(params[0]), STEPS)
    finally:
        live.model.train(training)
    return torch.tensor([settled_share(values, weights)], dtype=torch.float64)


def hidden_outputs(model: PreTrainedModel, batch: Mapping[str, Tensor], task: TaskConfig) -> list[Tensor]:
    """Output of each layer (rows, T·H), of an encoder-decoder first the encoder's; padding counts as zeros.

    They are what transformers hands out: the last one has gone through the final norm where the architecture has one.
    """
    found: list[Any] = []
    ask = model.register_forward_pre_hook(lambda _, args, kwargs: (args, {**kwargs, "output_hidden_states": True}), with_kwargs=True)
    take = model.register_forward_hook(lambda _, args, out: found.append(out))
    try:
        with torch.no_grad():
            loss_sum(model, batch, task)  # the way that the task itself goes
    finally:
        ask.remove()
        take.remove()
    real = batch["attention_mask"].bool()
    if not model.config.is_encoder_decoder:
        return [_flat(h, real) for h in found[0].hidden_states[1:]]
    answer = task_of(task).decoder_mask(batch)
    sides = (found[0].encoder_hidden_states, real), (found[0].decoder_hidden_states, answer)
    return [_flat(h, mask) for states, mask in sides for h in states[1:]]


def _flat(hidden: Tensor, real: Tensor) -> Tensor:
    return hidden.masked_fill(~real.unsqueeze(-1), 0.0).flatten(1)


def redundancy(x: Tensor) -> float:
    """Score of one layer's output x (rows, features): neither the order of the rows nor the scale of any of them matters."""
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    values = torch.linalg.eigvalsh(unit @ unit.T).clamp(min=0.0) + _FLOOR
    return float((values.log() + 1.0 / values).sum())


def hessian_product(loss: Tensor, params: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """v (P,) → Hv (P,), for the Hessian of `loss` with regard to all `params` laid end to end."""
    grads = torch.autograd.grad(loss, params, create_graph=True)

    def times(v: Tensor) -> Tensor:
        parts = [part.view_as(p) for part, p in zip(v.split([p.numel() for p in params]), params, strict=True)]
        out = torch.autograd.grad(grads, params, parts, retain_graph=True, materialize_grads=True)
        return torch.cat([t.flatten() for t in out])

    return times


def spectrum(times: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Gauss quadrature of a symmetric operator's spectral density, by Lanczos with full re-orthogonalization.

    Args:
        times: v (P,) → Hv (P,).
        start: (P,), such as random signs; its length does not matter.
        steps: m; fewer are done where the vectors so far span all that the start reaches.

    Returns:
        Nodes (m,), rising, and their weights (m,), which sum to 1; float64, on the CPU.

    Raises:
        UpdateError: A product is not finite.
    """
    v, basis = start / start.norm(), start.new_empty((min(steps, len(start)), len(start)))
    diagonal: list[float] = []
    beside: list[float] = []
    for step in range(len(basis)):
        w = times(v)
        if not torch.isfinite(w).all():
            raise UpdateError("the curvature of the prompts is not finite: lower client.lr, or set client.clip_norm")
        basis[step] = v
        diagonal.append(float(w @ v))
        span = basis[: step + 1]
        for _ in range(2):  # once leaves rounding errors that grow from step to step
            w = w - span.T @ (span @ w)
        norm = float(w.norm())
        if step + 1 == len(basis) or norm <= 1e-6 * max(map(abs, diagonal + beside)):
            break
        beside.append(norm)
        v = w / norm
    off = torch.tensor(beside, dtype=torch.float64)
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors[0] ** 2


def share_above(t: float, values: Tensor, weights: Tensor) -> float:
    """ρ(t): 1 less the mass of the smoothed density at eigenvalues ≤ t, never below 0."""
    sigma = math.sqrt(_VARIANCE * max(1.0, float(values.max() - values.min())))
    return max(0.0, 1.0 - float((weights * torch.special.ndtr((t - values) / sigma)).sum()))


def settled_share(values: Tensor, weights: Tensor) -> float:
    """ρ(t) at the first t where it has changed by less than .005 three times in a row, in steps of .1.

    Steps are halved, and t starts anew, where ρ falls below half of ρ(0) on the way. The smoothing ends this: steps much smaller than its
    width change ρ by less than .005 from the first on.
    """
    step, first = _STEP, share_above(0.0, values, weights)
    while True:
        share, still, k = first, 0, 0
        while share >= first / 2:
            if still == _SUCCESSIVE:
                return share
            k += 1
            before, share = share, share_above(k * step, values, weights)
            still = still + 1 if abs(share - before) < _SETTLED else 0
        step /= 2
