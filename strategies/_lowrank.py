"""Weighted sums of LoRA products in factored form, without W0 and without any tensor larger than the stacked factors.

D = Σ_k w_k B_k A_k is one product b @ a of the stacks a = [w_k A_k] (R, in) and b = [B_k] (out, R), R = Σ r_k. With the QR decompositions
b = Q_b R_b and aᵀ = Q_a R_a, the core R_b R_aᵀ, min(R, out) × min(R, in), has D's singular values; Q_b and Q_a map its singular vectors
to D's. All computations use float64.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fedtune.config import Config
from fedtune.config.method_files import factored, rank_power
from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.contracts.plan import Plan, Update, matching
from fedtune.contracts.strategy import Assignment
from fedtune.errors import ConfigError
from fedtune.strategies._mean import Mean

FACTORS = (".lora_A", ".lora_B")
Term = tuple[float, Tensor, Tensor]
"""(w, A (r, in), B (out, r)): the matrix w·B·A."""
Pair = tuple[Tensor, Tensor]
"""(a (R, in), b (out, R)): the matrix b @ a."""


class Cohort:
    """A round's updates: stores all factors, because stacking needs them, and a running mean of the other tensors.

    Args:
        average: Patterns of the tensors to average; by default heads and magnitudes, not the factors.
    """

    def __init__(self, average: tuple[str, ...] = ("*", "!*.lora_A", "!*.lora_B")) -> None:
        self._average = average
        self._sent: list[tuple[int, AdapterState]] = []
        self._mean = Mean()

    @classmethod
    def of(cls, updates: Iterable[Update], **settings: tuple[str, ...]) -> "Cohort":
        """The cohort of these updates; reads them one at a time."""
        cohort = cls(**settings)
        for update in updates:
            cohort.add(update)
        return cohort

    def add(self, update: Update) -> None:
        sent = update.adapter
        self._sent.append((update.examples, sent.subset([n for n in sent.tensors if n.endswith(FACTORS)])))
        self._mean.add(sent.subset(matching(sent.tensors, self._average)).tensors, update.examples)

    def terms(self, module: str) -> list[Term]:
        """(p_k s_k, A_k, B_k) of each client, with p_k = n_k / Σ n and the client's scaling s_k."""
        total = sum(n for n, _ in self._sent)
        return [(n / total * x.spec.scaling[module], x[f"{module}.lora_A"], x[f"{module}.lora_B"]) for n, x in self._sent]

    def missed(self, adapter: AdapterState, module: str) -> list[Term]:
        """Σ p_k (D − P_{r_k}(D)), the part of the current product D = s·B·A that the server did not send to clients of smaller ranks.

        P_r(D) is the product of the first r components, as in `at_rank`. Component i has the total weight p_k of the clients with r_k ≤ i.
        Returns one term, or none if every client has the full rank or D = 0.
        """
        total, rank = sum(n for n, _ in self._sent), adapter.spec.ranks[module]
        share = torch.zeros(rank, dtype=torch.float64)
        for n, sent in self._sent:
            share[sent.spec.ranks[module] :] += n / total
        if not share.any() or not adapter[f"{module}.lora_B"].any():
            return []
        return [(adapter.spec.scaling[module], share[:, None] * adapter[f"{module}.lora_A"].double(), adapter[f"{module}.lora_B"])]

    def mean(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Σ p_k w_k of the averaged tensors, with the dtypes of `like`."""
        return self._mean.of(like)


def stack(terms: Iterable[Term]) -> Pair:
    """The exact sum Σ w·B·A over the terms as one pair of rank Σ r."""
    weighted, right = zip(*((w * a.double(), b.double()) for w, a, b in terms), strict=True)
    return torch.cat(weighted), torch.cat(right, dim=1)


def svd(pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, m), σ (m,) in descending order, Vᵀ (m, in) of b @ a, with m = min(R, in, out); vectors for σ = 0 are orthonormal too.

    An SVD does not determine the signs. Here the largest entry of each left vector is positive, so that runs are reproducible.
    """
    a, b = pair
    q_b, r_b = _orthogonal(b)
    q_a, r_a = _orthogonal(a.T)
    u, sigma, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    u, vt = q_b @ u, vt @ q_a.T
    sign = torch.where(u.gather(0, u.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)  # (1, m)
    return u * sign, sigma, vt * sign.T


def _orthogonal(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (n, R) = q (n, m) r (m, R) with qᵀq = I, m = min(n, R); for R ≥ n, q = I and r = x."""
    return torch.linalg.qr(x) if x.shape[1] < len(x) else (torch.eye(len(x), dtype=x.dtype), x)


def truncate(pair: Pair, rank: int) -> Pair:
    """The best approximation of rank `rank` (Eckart-Young): a = Vᵀ (rank, in), b = U·diag(σ) (out, rank), by descending σ.

    Its error in the Frobenius norm is √(Σ_{i > rank} σ_i²). If min(R, in, out) < `rank`, the result is zero-padded.
    """
    u, sigma, vt = svd(pair)
    a, b = vt[:rank], (u * sigma)[:, :rank]
    missing = rank - len(a)
    return torch.cat([a, a.new_zeros(missing, a.shape[1])]), torch.cat([b, b.new_zeros(len(b), missing)], dim=1)


def compact(terms: Iterable[Term]) -> Pair:
    """Σ w·B·A over the terms as a pair of minimal rank; rank 0 if the sum is 0.

    Drops singular values below float32's epsilon times the largest term's norm: they are rounding errors.
    """
    terms = list(terms)
    u, sigma, vt = svd(stack(terms))
    rank = int((sigma > torch.finfo(torch.float32).eps * max(norm(t) for t in terms)).sum())
    return vt[:rank], (u * sigma)[:, :rank]


def norm(term: Term) -> float:
    """‖w·B·A‖ (Frobenius), from Gram matrices: ‖B·A‖² = tr((BᵀB)(AAᵀ))."""
    w, a, b = term[0], term[1].double(), term[2].double()
    return abs(w) * math.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())))


def at_rank(state: AdapterState, rank: int | None) -> AdapterState:
    """The adapter truncated to at most this rank; None leaves it unchanged."""
    return at_ranks(state, {m: min(r, rank or r) for m, r in state.spec.ranks.items()})


def at_ranks(state: AdapterState, ranks: Mapping[str, int]) -> AdapterState:
    """The adapter truncated to the first r rows of each A and columns of each B, with r = `ranks[module]`.

    alpha is constant, so the scaling grows from s = alpha / r (rslora: alpha / √r) to s_k as r falls. B is multiplied by s / s_k, so that
    s·B·A loses only its last components.
    """
    if dict(ranks) == dict(state.spec.ranks):
        return state
    power = rank_power(state.spec.method)
    tensors, scaling = dict(state.tensors), {}
    for module, r in ranks.items():
        growth = (state.spec.ranks[module] / r) ** power
        scaling[module] = state.spec.scaling[module] * growth
        tensors[f"{module}.lora_A"] = state[f"{module}.lora_A"][:r]
        tensors[f"{module}.lora_B"] = state[f"{module}.lora_B"][:, :r] / growth
    return state.replace(tensors, ranks=dict(ranks), scaling=scaling)


def assign(plans: Sequence[Plan], adapter: AdapterState) -> dict[str, Assignment]:
    """The adapter for each client, truncated to the rank of its plan; clients of the same rank share one object."""
    states = {rank: at_rank(adapter, rank) for rank in {plan.rank for plan in plans}}
    return {plan.client: Assignment(plan=plan, adapter=states[plan.rank]) for plan in plans}


def shift(pairs: Mapping[str, Pair], *, base: str, round: int) -> tuple[AdapterState, ...]:
    """The pairs (by module) as one shift of the frozen weights, W += b @ a, in float32; empty if every pair has rank 0."""
    pairs = {m: pair for m, pair in pairs.items() if len(pair[0])}
    if not pairs:
        return ()
    tensors: dict[str, Tensor] = {}
    for module, (a, b) in pairs.items():
        tensors |= {f"{module}.lora_A": a.float().contiguous(), f"{module}.lora_B": b.float().contiguous()}
    ranks, scaling = {m: len(a) for m, (a, _) in pairs.items()}, dict.fromkeys(pairs, 1.0)
    return (AdapterState(tensors, AdapterSpec(method="lora", base=base, version=round, ranks=ranks, scaling=scaling)),)


def with_factors(state: AdapterState, pairs: Mapping[str, Pair], rest: Mapping[str, Tensor]) -> AdapterState:
    """The adapter with new factors of the same ranks and new heads, with the dtypes and tensor order of `state`."""
    tensors = {**state.tensors, **rest}
    for module, pair in pairs.items():
        for suffix, factor in zip(FACTORS, pair, strict=True):
            tensors[module + suffix] = factor.to(state[module + suffix].dtype).contiguous()
    return state.replace(tensors)


def require_product(config: Config, name: str, *, exactly: bool = True, why: str) -> None:
    """Raises ConfigError with the reason `why` if `peft.method` has no LoRA factors, or (`exactly`) more than the change s·B·A."""
    methods = factored(exactly=exactly)
    if config.peft.method not in methods:
        raise ConfigError(
            f"strategy={name} does not work with peft.method={config.peft.method}: {why}; take peft={' or peft='.join(methods)}, or"
            " strategy=fedavg"
        )
