"""FedPepTAO: exchange only the prompts of some layers, and correct the server's step for the drift of the clients.

A run has three phases (here: of 30 rounds). The state determines the phase, not the round number: a failed round is repeated.

    warm-up   21 rounds   FedAvg of the prompts of all L layers
    scores    1 round     nothing is trained; on a batch of its rows each client scores the backbone's layers, s = Σ p_k s_k, and estimates
                          the share ρ_k of important layers from the curvature after the warm-up, ρ = mean ρ_k
    partial   8 rounds    S = the ⌈ρL⌉ layers with the lowest score; clients train all layers, but exchange only S (and a head)

The config sets the warm-up to 70 % of the rounds. The global model is what clients train jointly. Layers outside S stop at the end of
the warm-up, so the warm-up must cover the rounds with high learning rates. For the same reason the layers are scored after it: the round
without training comes when the rate is low. The scores do not depend on the prompts, so their time does not matter otherwise.

Partial round t, over the tensors of S and the head (w_i: client i's, τ_i its steps, η its learning rate, p_i its weight, m clients of N):

    w̄ = Σ p_i w_i,   Δ_t = w_{t-1} − w̄,   u_i = (w_{t-1} − w_i) / (τ_i η),   t = 1: w_t = w̄

    variant  c_i⁺            c⁺                                        g                            w_t, t ≥ 2
    scaled   u_i             mean of all c_i known so far              Δ_{t-1}/T_{t-1} − Δ_t/T_t    w̄ − κ T_t v,   T_t = Σ p_i τ_i η
    paper    c_i − c + u_i   c + (m/N) Σ (τ_i / Σ τ) (c_i⁺ − c_i)      Δ_{t-1} − Δ_t                w̄ − η_s v,     η_s ← max(.99 η_s, 1e-4)

    v_i = βv + (1−β)g + c⁺ − c_i⁺,   v ← Σ p_i v_i

`paper` diverges unless the clients use the paper's learning rate, for two reasons. First, c⁺ − c_i⁺ has the units of a gradient (AdamW: of
order 1 per entry), so η_s·v moves each entry by up to η_s per round, regardless of η. Second, c_i accumulates u_i − c over the rounds. The
formula is SCAFFOLD's. There, clients add c − c_i to their steps, so that the sum is the client's gradient. Here, clients do not correct
their steps, and the sum grows with every turn. `scaled`, our fix, keeps v in gradient units, sets c_i to u_i, and moves by a share κ of
the cohort's mean step, which falls with the clients' rate.

In the layers outside S, each client continues with its own prompts. In a client's first partial turn the server sends all layers, so that
these prompts start from the warm-up; later it sends only S. The global model keeps the warm-up's prompts outside S. A client's own model is
S with its own prompts.

Source: Che et al. 2023, Federated Learning of Large Language Models with Parameter-Efficient Prompt Tuning and Adaptive Optimization, EMNLP
2023, arXiv:2310.15080; its public code, https://github.com/llm-eff/FedPepTAO, ranks the most redundant layers first, has no warm-up before
the partial rounds, decays η_s before its first use, and scores each client with its own layers. The score is that of Mellor et al. 2021,
arXiv:2006.04647, without its minus sign: there, diversity ranks first. Our default does the same, because the global model is then better.
Paper and code do not specify three points. Our choices: τ_i η is the sum of the learning rates that the client used; N counts the clients
that have answered so far, in any phase; c and v are 0 at the start of the partial phase.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedtune.config import Config
from fedtune.config.bounds import require
from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.contracts.plan import Plan, Update
from fedtune.contracts.strategy import Assignment, Requirements, ServerState, Strategy
from fedtune.errors import ConfigError
from fedtune.strategies._flower import measured
from fedtune.strategies._mean import Mean
from fedtune.strategies._require import whole_updates

_VARIANTS = ("scaled", "paper", "code")
_DECAY, _LEAST_LR = 0.99, 1e-4  # of η_s, a round, in the paper's rule
_PACE = ("steps", "lr_sum")  # a client's measurements of τ_i and τ_i η


@dataclass(frozen=True, kw_only=True)
class FedPepTAO(Strategy):
    """Partial prompt tuning with a drift-corrected server step; one prompt per layer, named `*.prompt` in the order of the layers.

    Memory: `layers` (L,), the scores; `warmups`, `ratio`, and for the paper's rule `server_lr`; `seen/<client>`, 1 after its first partial
    turn; and for each exchanged tensor `c/<client>/<tensor>`, `drift/<tensor>` (c), `v/<tensor>`, `delta/<tensor>` (Δ_{t-1}): in total,
    clients + 3 times a payload.

    Args:
        ratio: ρ, the share of the layers to exchange, in (0, 1]; None lets the clients estimate it. 1 needs no scores.
        order: Which layers come first: the most `diverse` ones (low score), or the most `redundant` ones, as in the public code.
        warmup_rounds: Rounds that train and exchange all layers; the config computes them from the length of the run.
        score_rows: Rows of the batch for scores and estimates; a client with fewer rows uses all of them.
        personal: Whether each client trains its own prompts in the layers outside S; otherwise these keep the warm-up's values.
        server_lr: κ, a share of the cohort's mean step; with `paper` and `code` the initial η_s, in the units of a client's rate. 0 gives
            the plain mean.
        momentum: β, in [0, 1).
        variant: `scaled` or `paper`, as above; or `code`. `code` is `paper` with one buffer for all clients of a round, as in the public
            code: v_i starts from v_{i-1} instead of v (here in the order of logical ids).
    """

    ratio: float | None = None
    order: str = "diverse"
    warmup_rounds: int = 21
    score_rows: int = 16
    personal: bool = True
    server_lr: float = 0.1
    momentum: float = 0.9
    variant: str = "scaled"

    requirements: ClassVar[Requirements] = Requirements(
        keeps_basis=True, assumes_zero_init=False, beyond_adapter=True, extra_disclosure="scores of their rows"
    )

    def check(self, config: Config) -> None:
        def refuse(wrong: bool, sentence: str) -> None:
            if wrong:
                raise ConfigError(sentence)

        method, rounds, before = config.peft.method, config.rounds, self.rounds_before_partial
        refuse(method != "ptuning_v2", f"fedpeptao exchanges one prompt a layer, peft.method={method} has none: set peft=ptuning_v2")
        refuse(self.order not in ("redundant", "diverse"), f"strategy.order={self.order} is not known: choose redundant or diverse")
        refuse(self.variant not in _VARIANTS, f"strategy.variant={self.variant} is not known: choose scaled, paper or code")
        require("strategy.ratio", self.ratio, gt=0, le=1)
        require("strategy.warmup_rounds", self.warmup_rounds, ge=0)
        require("strategy.score_rows", self.score_rows, ge=2)  # rows are compared with each other
        require("strategy.server_lr", self.server_lr, ge=0)
        require("strategy.momentum", self.momentum, ge=0, lt=1)
        if self.server_lr:
            whole_updates(config, "fedpeptao", ", or strategy.server_lr=0, which gives the plain mean")
        refuse(
            0 < rounds <= before,
            f"fedpeptao selects layers after {before} rounds of warm-up and scoring, but rounds={rounds}:"
            " raise rounds, or lower strategy.warmup_rounds",
        )

    @property
    def rounds_before_partial(self) -> int:
        """Rounds of warm-up and scoring, if none of them fails."""
        return self.warmup_rounds + (self.ratio != 1)

    def phase(self, state: ServerState) -> str:
        """The phase of the next round: warmup, scores or partial."""
        if _number(state.memory, "warmups") < self.warmup_rounds:
            return "warmup"
        return "partial" if self._reply(state.adapter).tensors.keys() <= state.memory.keys() else "scores"

    def _reply(self, adapter: AdapterState) -> AdapterState:
        """The shape of a score turn's reply in float64: `layers` (L,), and `ratio` (1,) if it is estimated; nothing if ratio = 1."""
        sizes = {} if self.ratio == 1 else {"layers": len(_prompts(adapter))} | ({"ratio": 1} if self.ratio is None else {})
        spec = AdapterSpec(method="scores", base=adapter.spec.base, version=adapter.spec.version)
        return AdapterState({name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()}, spec)

    def local(self, state: ServerState) -> list[str]:
        """The prompts outside S, in the order of the layers."""
        prompts = _prompts(state.adapter)
        share = _number(state.memory, "ratio") if self.ratio is None else self.ratio
        if share == 1:
            return []
        count = max(1, math.ceil(share * len(prompts) - 1e-9))  # in floating point, 0.1 · 30 is slightly more than 3
        ranked = torch.argsort(state.memory["layers"], descending=self.order == "redundant", stable=True).tolist()
        return [prompts[i] for i in sorted(ranked[count:])]

    # -- to the clients ----------------------------------------------------------------------------------------------------------------

    def plan(self, round: int, plans: Sequence[Plan], state: ServerState) -> Mapping[str, Assignment]:
        phase, adapter = self.phase(state), state.adapter
        if phase == "warmup":
            return {p.client: Assignment(plan=p, adapter=adapter) for p in plans}
        if phase == "partial":
            return self._plan_partial(plans, state)
        share, reply = self.ratio is None, self._reply(adapter)
        sent = adapter if share else adapter.subset([])  # layers are scored without prompts
        ask = {"turn": "fedpeptao", "params": {"share": share}, "batch_size": self.score_rows}  # overrides the turn that client.prox sets
        return {p.client: Assignment(plan=dataclasses.replace(p, **ask), adapter=sent, expect=reply) for p in plans}

    def _plan_partial(self, plans: Sequence[Plan], state: ServerState) -> Mapping[str, Assignment]:
        adapter, local = state.adapter, self.local(state)
        part = adapter.subset([n for n in adapter.tensors if n not in local])
        exchanged = ("*", *(f"!{n}" for n in local))
        limits = {"train": ("*",) if self.personal else exchanged, "send": exchanged, "keep": tuple(local)}

        def sent(client: str) -> AdapterState:
            has_own = not self.warmup_rounds or _number(state.memory, f"seen/{client}")
            return part if has_own else adapter

        return {p.client: Assignment(plan=dataclasses.replace(p, **limits), adapter=sent(p.client)) for p in plans}

    # -- from the clients --------------------------------------------------------------------------------------------------------------

    def aggregate(self, round: int, state: ServerState, updates: Iterable[Update]) -> ServerState:
        phase, memory, mean, shares = self.phase(state), dict(state.memory), Mean(), Mean()
        if phase == "partial":
            return self._aggregate_partial(state, updates)
        for update in updates:
            memory.setdefault(f"seen/{update.client}", torch.tensor(0, dtype=torch.uint8))
            tensors = dict(update.adapter.tensors)
            if (share := tensors.pop("ratio", None)) is not None:
                shares.add({"ratio": share.clamp(0.0, 1.0)}, 1)  # ρ is an unweighted mean
            mean.add(tensors, update.examples)
        if phase == "warmup":
            memory["warmups"] = torch.tensor(int(_number(memory, "warmups")) + 1)
            return dataclasses.replace(state, adapter=state.adapter.replace(mean.of(state.adapter.tensors)), memory=memory)
        like = self._reply(state.adapter).tensors
        return dataclasses.replace(state, memory=memory | mean.of(like) | shares.of(like))

    def _aggregate_partial(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        local = self.local(state)
        old = {n: t.double() for n, t in state.adapter.tensors.items() if n not in local}
        memory, mean, pace, change = dict(state.memory), Mean(), 0.0, Mean()
        scaled, c = self.variant == "scaled", _recall(memory, "drift", old)
        known, examples = _number_with(memory, "c/", old), dict[str, int]()
        for update in updates:
            client, w = update.client, update.adapter.tensors
            mean.add(w, update.examples)
            memory[f"seen/{client}"] = torch.tensor(1, dtype=torch.uint8)
            examples[client] = update.examples
            if self.server_lr:
                own, steps, lr_sum = _recall(memory, f"c/{client}", old), *(measured(update, update.measurements, n) for n in _PACE)
                pace += update.examples * lr_sum
                # lr_sum = 0, as in the first step of a learning-rate warm-up: no change, so no drift estimate
                moved = {n: (old[n] - w[n].double()) / lr_sum for n in old} if lr_sum else None
                new = own if moved is None else moved if scaled else {n: own[n] - c[n] + moved[n] for n in old}
                change.add({n: new[n] - own[n] for n in old}, 1 if scaled else max(steps, 1))
                _store(memory, f"c/{client}", new, state.adapter)
        average = mean.of(old)
        if self.server_lr:
            clients = _number_with(memory, "c/", old) if scaled else sum(n.startswith("seen/") for n in memory)
            before, moved = known / clients if scaled else 1.0, change.of(old)
            c = {n: before * c[n] + len(examples) / clients * moved[n] for n in old}
            _store(memory, "drift", c, state.adapter)
            average = self._step(average, old, c, examples, pace / mean.weight, memory, state.adapter)
        tensors = {n: average[n].to(t.dtype) if n in average else t for n, t in state.adapter.tensors.items()}
        return dataclasses.replace(state, adapter=state.adapter.replace(tensors), memory=memory)

    def _step(
        self,
        average: dict[str, Tensor],
        old: Mapping[str, Tensor],
        c: Mapping[str, Tensor],
        examples: Mapping[str, int],
        pace: float,
        memory: dict[str, Tensor],
        like: AdapterState,
    ) -> dict[str, Tensor]:
        """w̄ → w_t. Updates the momentum in `memory`; `pace` is the cohort's mean τη."""
        if pace == 0 and self.variant == "scaled":  # no client has moved
            return average
        unit, lr = (pace, self.server_lr * pace) if self.variant == "scaled" else (1.0, self._server_lr(memory))
        delta = {n: (old[n] - average[n]) / unit for n in old}
        first = not _number_with(memory, "delta/", old)
        before, v = _recall(memory, "delta", old), _recall(memory, "v", old)
        _store(memory, "delta", delta, like)
        if first:  # t = 1: there is no Δ_{t-1} yet
            return average
        g = {n: before[n] - delta[n] for n in old}
        carried, mean = v, Mean()
        for client in sorted(examples):
            start, own = carried if self.variant == "code" else v, _recall(memory, f"c/{client}", old)
            carried = {n: self.momentum * start[n] + (1 - self.momentum) * g[n] + c[n] - own[n] for n in old}
            mean.add(carried, examples[client])
        v = mean.of(old)
        _store(memory, "v", v, like)
        return {n: average[n] - lr * v[n] for n in old}

    def _server_lr(self, memory: dict[str, Tensor]) -> float:
        """η_s of the paper's rule: decays it each round and stores it in `memory`."""
        last = memory.get("server_lr")
        lr = self.server_lr if last is None else max(_DECAY * last.item(), _LEAST_LR)
        memory["server_lr"] = torch.tensor(lr, dtype=torch.float64)
        return lr

    def notes(self, round: int, before: ServerState, after: ServerState) -> list[str]:
        if self.phase(before) == "partial" or self.phase(after) != "partial":
            return []
        prompts, local = _prompts(after.adapter), self.local(after)
        chosen = [str(i) for i, n in enumerate(prompts) if n not in local]
        share = "" if self.ratio is not None else f" (estimated share {_number(after.memory, 'ratio'):.3f})"
        return [f"from now on {len(chosen)} of {len(prompts)} layers are exchanged{share}: {', '.join(chosen)}"]


def _prompts(adapter: AdapterState) -> list[str]:
    return [n for n in adapter.tensors if n.endswith(".prompt")]


def _number(memory: Mapping[str, Tensor], name: str) -> float:
    """A number in the memory, or 0 if it is missing."""
    return float(memory[name]) if name in memory else 0.0


def _number_with(memory: Mapping[str, Tensor], what: str, like: Mapping[str, Tensor]) -> int:
    """The number of stored states whose keys start with `what`, counted by one of their tensors."""
    name = next(iter(like))
    return sum(n.startswith(what) and n.endswith(f"/{name}") for n in memory)


def _recall(memory: Mapping[str, Tensor], what: str, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`what/<tensor>` for each tensor, in float64, or 0 if it is missing."""
    return {n: memory[f"{what}/{n}"].double() if f"{what}/{n}" in memory else torch.zeros_like(t) for n, t in like.items()}


def _store(memory: dict[str, Tensor], what: str, values: Mapping[str, Tensor], like: AdapterState) -> None:
    memory.update({f"{what}/{n}": t.to(like[n].dtype) for n, t in values.items()})
