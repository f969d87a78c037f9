"""FedPepTAO's two measurements: the redundancy of each layer of the backbone, and the share of important prompts.

Redundancy of the backbone without prompts, on a batch of the client's rows: for a layer's hidden output X (rows, T·H) and the eigenvalues λ
of the rows' cosine Gram matrix, s = Σ_i [log λ_i + 1/λ_i] with 1e-5 added to each λ. Orthogonal rows add 1 each, nearly equal rows about
1e5 each: a higher score means more redundancy.

Share: Lanczos gives the spectral density of the Hessian of the loss with respect to all prompts; ρ(t) = 1 − mass(λ ≤ t). t rises from 0
until ρ is stable.

Source: Che et al. 2023, arXiv:2310.15080, section 4.2. The score has the form of Mellor et al. 2021, Neural Architecture Search without
Training, arXiv:2006.04647. The density is estimated by stochastic Lanczos quadrature as in Yao et al. 2020, PyHessian: Neural Networks
Through the Lens of the Hessian, arXiv:1912.07145, with one random vector and Gaussians of variance 1e-5·max(1, range of the eigenvalues).
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
from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.contracts.seeds import derive_seed
from fedtune.contracts.task import task_of
from fedtune.data import collate
from fedtune.errors import ModelError, PlanError, UpdateError
from fedtune.models import LiveAdapter, loss_sum

_FLOOR = 1e-5
STEPS = 50  # Lanczos steps
_STEP, _SETTLED, _SUCCESSIVE = 0.1, 0.005, 3
_VARIANCE = 1e-5


@dataclass(frozen=True, kw_only=True)
class FedPepTAO(Turn):
    """Measures on `plan.batch_size` rows drawn with `plan.seed` (all rows if there are fewer); does not train.

    Args:
        share: Whether to estimate the share of important prompts, too; the redundancy of each layer is always measured.
    """

    share: bool

    @property
    def trains(self) -> bool:
        return False

    def observe(self, work: Work) -> AdapterState:
        live = work.live
        if not isinstance(live, LiveAdapter):
            raise PlanError("the turn 'fedpeptao' measures prompts, but the adapter has method 'sparse': set peft=ptuning_v2 on the server")
        rows = next(batches(len(work.examples), work.plan.batch_size, work.plan.seed))
        batch = {k: v.to(live.backbone.device) for k, v in collate([work.examples[i] for i in rows], work.pad_id).items()}
        scores = {"layers": layer_scores(live, batch, work.task)}
        if self.share:
            scores["ratio"] = prompt_share(live, batch, work.task, derive_seed(work.plan.seed, "lanczos"))
        return AdapterState(scores, AdapterSpec(method="scores", base=live.spec.base, version=work.plan.base_version))


def layer_scores(live: LiveAdapter, batch: Mapping[str, Tensor], task: TaskConfig) -> Tensor:
    """The redundancy of each layer, (L,) float64.

    Raises:
        ModelError: The number of layers whose outputs the backbone returns differs from the adapter's number of prompts.
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
            f"the backbone returns the outputs of {len(hidden)} layers, but the adapter has {prompts} prompts: set peft=ptuning_v2"
        )
    return torch.tensor([redundancy(h) for h in hidden], dtype=torch.float64)


def prompt_share(live: LiveAdapter, batch: Mapping[str, Tensor], task: TaskConfig, seed: int) -> Tensor:
    """The share of important prompts, (1,) float64.

    Needs the autograd graph of one batch, STEPS Hessian-vector products, and memory for STEPS vectors of the size of all prompts.

    Raises:
        UpdateError: The curvature is not finite.
    """
    params = [p for n, p in live.parameters.items() if n.endswith(".prompt")]
    training = live.model.training
    live.model.eval()
    try:
        # fused attention kernels do not support second derivatives; torch's math kernel does
        with sdpa_kernel(SDPBackend.MATH):
            loss, count = loss_sum(live.model, batch, task)
            times = hessian_product(loss / max(count, 1), params)
            signs = torch.randint(0, 2, (sum(p.numel() for p in params),), generator=torch.Generator().manual_seed(seed)) * 2 - 1
            values, weights = spectrum(times, signs.to(params[0]), STEPS)
    finally:
        live.model.train(training)
    return torch.tensor([settled_share(values, weights)], dtype=torch.float64)


def hidden_outputs(model: PreTrainedModel, batch: Mapping[str, Tensor], task: TaskConfig) -> list[Tensor]:
    """Output of each layer (rows, T·H), zero at padding; in an encoder-decoder, the encoder's layers come first.

    These are transformers' `hidden_states`: if the architecture has a final norm, the last output includes it.
    """
    found: list[Any] = []
    ask = model.register_forward_pre_hook(lambda _, args, kwargs: (args, {**kwargs, "output_hidden_states": True}), with_kwargs=True)
    take = model.register_forward_hook(lambda _, args, out: found.append(out))
    try:
        with torch.no_grad():
            loss_sum(model, batch, task)  # the task's own forward pass
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
    """Score of one layer's output x (rows, features); invariant to the order of the rows and to the scale of each."""
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    values = torch.linalg.eigvalsh(unit @ unit.T).clamp(min=0.0) + _FLOOR
    return float((values.log() + 1.0 / values).sum())


def hessian_product(loss: Tensor, params: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """v (P,) → Hv (P,), for the Hessian of `loss` with respect to all `params`, concatenated."""
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
        start: (P,), such as random signs, of any norm.
        steps: m; fewer if the Krylov space of `start` has a smaller dimension.

    Returns:
        Nodes (m,) in ascending order and their weights (m,), which sum to 1; float64, on the CPU.

    Raises:
        UpdateError: A product is not finite.
    """
    v, basis = start / start.norm(), start.new_empty((min(steps, len(start)), len(start)))
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    for step in range(len(basis)):
        w = times(v)
        if not torch.isfinite(w).all():
            raise UpdateError("the curvature of the prompts is not finite: lower client.lr")
        basis[step] = v
        diagonal.append(float(w @ v))
        span = basis[: step + 1]
        for _ in range(2):  # one pass leaves rounding errors that grow with every step
            w = w - span.T @ (span @ w)
        norm = float(w.norm())
        if step + 1 == len(basis) or norm <= 1e-6 * max(map(abs, diagonal + off_diagonal)):
            break
        off_diagonal.append(norm)
        v = w / norm
    off = torch.tensor(off_diagonal, dtype=torch.float64)
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors[0] ** 2


def share_above(t: float, values: Tensor, weights: Tensor) -> float:
    """ρ(t) = 1 − the mass of the smoothed density at eigenvalues ≤ t; at least 0."""
    sigma = math.sqrt(_VARIANCE * max(1.0, float(values.max() - values.min())))
    return max(0.0, 1.0 - float((weights * torch.special.ndtr((t - values) / sigma)).sum()))


def settled_share(values: Tensor, weights: Tensor) -> float:
    """ρ(t) at the first t, in steps of 0.1, after three successive changes below 0.005.

    If ρ falls below half of ρ(0) before that, the step is halved and t restarts at 0. This terminates because the density is smoothed: a
    step much smaller than the Gaussians' width changes ρ by less than 0.005.
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
