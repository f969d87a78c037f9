"""SLoRA: a sparse training stage provides LoRA's initialization.

Stage 1 trains a few entries of the frozen matrices under a mask that all clients share. Stage 2 is federated LoRA, initialized by the SVD
of stage 1's change. Clients send only the masked entries, as differences from the frozen weights, so that the server needs no backbone.

A warm start (peft.from) is part of the frozen weights, so stage 1 begins at the earlier model.

Source: Babakniya et al. 2023, SLoRA: Federated Parameter Efficient Fine-Tuning of Language Models, arXiv:2308.06522, section 4.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedtune.config import Config
from fedtune.config.bounds import require
from fedtune.contracts.adapter_state import AdapterState, random_mask
from fedtune.contracts.plan import Plan, Update
from fedtune.contracts.strategy import Assignment, Requirements, ServerState, Strategy
from fedtune.errors import ConfigError
from fedtune.strategies._lowrank import FACTORS, Pair, require_product, shift
from fedtune.strategies._mean import Mean

QUANTIZED = ("nf4", "int8")
MASKS, MODES = ("random", "gradient"), ("paper", "corrected")
_VALUES = ("*", "!*.index")  # clients do not send positions


@dataclass(frozen=True, kw_only=True)
class SLoRA(Strategy):
    """Stage 1: δ ← Σ p_k δ_k under a mask; switch: s·B·A = SVD_r(D), D = scatter(δ); stage 2: FedAvg of A and B.

    The state determines the stage: method `sparse` is stage 1. The switch happens at the end of the last sparse round. If that round fails,
    it happens at the end of the next successful round, so that stage 1 is never empty. Before the switch, the server's memory holds the
    initial LoRA factors as `<method>/<module>.lora_A`; after it, the share of ‖D‖² that rank r keeps as `energy/<module>`.

    Args:
        rounds: Rounds of the run.
        seed: Seed of the run, for the random mask.
        sparse_share: Share of the rounds in stage 1; at least one round.
        density: Share d of each matrix's entries under the mask; None selects as many entries as LoRA's factors have, r·(in + out).
        mask: `random`: drawn from the seed without traffic. `gradient`: the largest entries of Σ p_k|∇W|. It needs one more round before
            stage 1: each client sends the dense gradient of one batch for all adapted matrices, in float32. The server then sends the
            mask's positions with the values, 4 bytes each.
        mode: `paper` keeps W0 and loses the part of D beyond rank r. `corrected` shifts W0 by D − s·B·A, so that the switch does not change
            the model. Each client gets the shift once; it may be larger than the backbone: (in + out)·rank floats per matrix.
    """

    rounds: int
    seed: int
    sparse_share: float = 0.1
    density: float | None = 0.01
    mask: str = "random"
    mode: str = "paper"

    @property
    def last_sparse_round(self) -> int:
        return max(1, round(self.sparse_share * self.rounds)) + (self.mask == "gradient")

    # assumes_zero_init: the sparse stage drops the initial B
    requirements: ClassVar[Requirements] = Requirements(
        keeps_basis=True, beyond_adapter=True, extra_disclosure="gradients of their rows and weights outside of peft.method"
    )

    def check(self, config: Config) -> None:
        for name, choices in (("mask", MASKS), ("mode", MODES)):
            require(f"strategy.{name}", getattr(self, name), choices=choices)
        require("strategy.sparse_share", self.sparse_share, ge=0, le=1)
        require("strategy.density", self.density, gt=0, le=1)
        require_product(config, "slora", why="its SVD initializes two factors and nothing else")
        classes = config.devices.classes.items()
        free = [n for n, d in classes if d.precision in QUANTIZED or (d.precision is None and d.memory_mb is not None)]
        if config.model.precision in QUANTIZED or free:
            which = f"devices.classes.{free[0]}.precision" if free else "model.precision"
            raise ConfigError(
                "strategy=slora trains entries of the frozen weights in its first stage, and quantized weights cannot be trained:"
                f" set {which}=bf16" + (", and so for each class, or devices=none" if free else "")
            )
        if config.rounds < self.last_sparse_round:
            raise ConfigError(
                f"strategy=slora ends its sparse stage with round {self.last_sparse_round}, but rounds={config.rounds}: set more rounds"
            )

    def start(self, adapter: AdapterState) -> ServerState:
        factors = {f"{adapter.spec.method}/{n}": t for n, t in adapter.tensors.items() if n.endswith(FACTORS)}
        if self.mask == "gradient":
            return ServerState(adapter=adapter, memory=factors)
        shapes = _shapes(factors)
        zeros = {m: {"sparse": torch.zeros(self._entries(adapter, m, *shape))} for m, shape in shapes.items()}
        return ServerState(adapter=_put(adapter, zeros).replace(method="sparse", mask=str(self.seed)), memory=factors)

    def plan(self, round: int, plans: Sequence[Plan], state: ServerState) -> Mapping[str, Assignment]:
        shapes = _shapes(state.memory)
        if not shapes:
            return super().plan(round, plans, state)
        if state.adapter.spec.method == "sparse":
            turns = [dataclasses.replace(plan.with_turn("slora", stage="sparse"), send=_VALUES) for plan in plans]
            return {turn.client: Assignment(plan=turn, adapter=state.adapter) for turn in turns}
        turns = [plan.with_turn("slora", stage="gradient") for plan in plans]
        dense = {f"{m}.gradient": torch.zeros(()).expand(shape) for m, shape in shapes.items()}  # shapes without storage
        nothing, expect = state.adapter.subset([]), state.adapter.replace(dense)
        return {turn.client: Assignment(plan=turn, adapter=nothing, expect=expect) for turn in turns}

    def aggregate(self, round: int, state: ServerState, updates: Iterable[Update]) -> ServerState:
        mean = Mean()
        for update in updates:
            mean.add(update.adapter.tensors, update.examples)
        adapter, shapes = state.adapter, _shapes(state.memory)
        if shapes and adapter.spec.method != "sparse":
            scores = mean.of({f"{m}.gradient": torch.zeros((), dtype=torch.float64) for m in shapes})
            return dataclasses.replace(state, adapter=self._masked(adapter, scores))
        after = dataclasses.replace(state, adapter=adapter.replace({**adapter.tensors, **mean.of(adapter.tensors)}))
        return self._switch(round, after) if shapes and round >= self.last_sparse_round else after

    def notes(self, round: int, before: ServerState, after: ServerState) -> list[str]:
        kept = {n.removeprefix("energy/"): float(t) for n, t in after.memory.items() if n.startswith("energy/")}
        if not kept or any(n.startswith("energy/") for n in before.memory):
            return []
        mean = sum(kept.values()) / len(kept)
        each = ", ".join(f"{m} {share:.0%}" for m, share in sorted(kept.items()))
        rest = "the rest stays in the frozen weights" if self.mode == "corrected" else "the rest is lost"
        return [f"LoRA starts from the sparse stage: it keeps {mean:.0%} of the energy, {rest}; by module: {each}"]

    def _entries(self, adapter: AdapterState, module: str, rows: int, columns: int) -> int:
        """Entries of a module's (out, in) matrix under the mask."""
        wanted = adapter.spec.ranks[module] * (rows + columns) if self.density is None else round(self.density * rows * columns)
        return min(max(wanted, 1), rows * columns)

    def _masked(self, adapter: AdapterState, scores: Mapping[str, Tensor]) -> AdapterState:
        """The sparse state with the mask of the highest scores."""
        parts = {}
        for name, score in scores.items():
            module = name.removesuffix(".gradient")
            count = self._entries(adapter, module, *score.shape)
            index = score.flatten().topk(count).indices.sort().values
            parts[module] = {"index": index.to(torch.int32), "sparse": torch.zeros(count)}
        return _put(adapter, parts).replace(method="sparse", mask="")

    def _switch(self, round: int, state: ServerState) -> ServerState:
        """From stage 1 to stage 2."""
        sparse, shapes = state.adapter, _shapes(state.memory)
        method = next(iter(state.memory)).partition("/")[0]
        factors, tails, energy = {}, {}, {}
        for module, (rows, columns) in shapes.items():
            values = sparse[f"{module}.sparse"].double()
            index = sparse.tensors.get(f"{module}.index")
            index = random_mask(sparse.spec.mask, module, rows * columns, len(values)) if index is None else index.long()
            dense = torch.zeros(rows * columns, dtype=torch.float64).index_copy_(0, index, values).view(rows, columns)
            start = state.memory[f"{method}/{module}.lora_A"]
            factors[module], tails[module], energy[f"energy/{module}"] = _split(dense, start, sparse.spec.scaling[module])
        adapter = _put(sparse, factors).replace(method=method, mask="")
        lost = shift(tails, base=adapter.spec.base, round=round) if self.mode == "corrected" else ()
        return ServerState(adapter=adapter, memory=energy, shifts=(*state.shifts, *lost))


def _split(dense: Tensor, start: Tensor, scaling: float) -> tuple[dict[str, Tensor], Pair, Tensor]:
    """Split D into LoRA factors and a remainder.

    Args:
        dense: D (out, in), float64.
        start: The initial A (r, in), float32. Beyond D's rank, A keeps these rows and B is 0, as in LoRA's initialization: if A were 0 too,
            both gradients would vanish.
        scaling: s.

    Returns:
        A (r, in) and B (out, r) with s·B·A = SVD_r(D); a (R, in) and b (out, R) with b @ a = D − s·B·A; the share of ‖D‖² in s·B·A, 1 for
        D = 0.
    """
    rank = len(start)
    u, sigma, vt = torch.linalg.svd(dense, full_matrices=False)
    known = int((sigma > sigma[0] * max(dense.shape) * torch.finfo(torch.float64).eps).sum())  # the numerical rank of D
    head, tail, root = slice(0, min(rank, known)), slice(min(rank, known), known), sigma.sqrt()
    a, b = start.double().clone(), torch.zeros(len(dense), rank, dtype=torch.float64)
    a[head] = root[head, None] * vt[head] / scaling**0.5
    b[:, head] = u[:, head] * root[head] / scaling**0.5
    rest = (root[tail, None] * vt[tail], u[:, tail] * root[tail])
    energy = sigma[head].square().sum() / sigma.square().sum() if known else torch.ones((), dtype=torch.float64)
    return {"lora_A": a.to(start.dtype), "lora_B": b.to(start.dtype)}, rest, energy


def _shapes(memory: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Module → (out, in), from the LoRA factors in the memory; empty after the switch."""
    rows = {n.partition("/")[2].removesuffix(".lora_B"): len(t) for n, t in memory.items() if n.endswith(".lora_B")}
    columns = {n.partition("/")[2].removesuffix(".lora_A"): t.shape[1] for n, t in memory.items() if n.endswith(".lora_A")}
    return {m: (rows[m], columns[m]) for m in rows}


def _put(adapter: AdapterState, parts: Mapping[str, Mapping[str, Tensor]]) -> AdapterState:
    """The adapter with each module's tensors replaced by those of `parts`, in the same position; heads stay unchanged."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in adapter.tensors.items():
        module = name.rpartition(".")[0]
        tensors.update({f"{module}.{n}": t for n, t in parts[module].items()} if module in parts else {name: tensor})
    return adapter.replace(tensors)
