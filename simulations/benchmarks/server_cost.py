"""What a round costs the server: aggregating 1,000 clients' adapters of 10 MB, by strategy, against NumPy's bare weighted mean.

    python -m fedtune.simulations.benchmarks.server_cost --clients 1000 --mb 10 --out server_cost

Each strategy gets what its clients would send in round 1: LoRA of rank 16 on q and v of as many layers of width 1024 as the size asks for
(FedPepTAO, without its scores: a prompt of 32 tokens a layer), or the part of it that the method sends (phase sparse: SLoRA's masked
entries). Updates are made one at a time and forgotten by the stream: windows of one buffer of noise, copied, so that an update that is kept
costs its memory. Draining the stream alone is timed as a third side, and its seconds are taken off both others. The three sides run in turn
(A B C A B C ...), so that a machine whose speed drifts drifts for all; quote the ratio. The bare mean adds n · w in float32; ours add in
float64, so that a client alone comes back bit for bit.

Memory is the high-water mark of a pass above what the process held before it (freed memory is given back to the system first). `in
updates` says how many updates that is: a few where the method folds the stream, the cohort where it must see all at once. A method that
would not fit --max-gb or --max-s at the full cohort is shown with the largest step (x 4) that did.
"""

import argparse
import ctypes
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from fedtune.clients.meter import peak_mb, reset_peak
from fedtune.config.compose import choices, compose
from fedtune.contracts import flower
from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.contracts.plan import PLAIN, Plan, Update, matching
from fedtune.contracts.strategy import Strategy
from fedtune.errors import FedtuneError
from fedtune.rounds.find_strategy import make_strategy
from fedtune.runs.report.tables import print_table

WIDTH, RANK, TOKENS = 1024, 16, 32
PROMPTS = ("fedpeptao",)  # it exchanges prompts, and nothing else
_WINDOWS, _STRIDE = 8191, 997
_FIRST, _STEP = 16, 4  # enough clients for every robust rule
_CPU = torch.device("cpu")
COLUMNS = ("strategy", "clients", "MB an update", "s a round", "NumPy s", "x NumPy", "peak MB", "in updates")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One strategy's cost: medians over the repeats, the stream's own seconds taken off.

    Args:
        strategy: Its name.
        clients: Updates of the round.
        update_mb: MB (10^6 bytes) of one update.
        seconds: Seconds of `aggregate`, net.
        numpy_seconds: Seconds of the bare mean of the same stream, net.
        stream_seconds: Seconds of the stream alone.
        ratio: Median over the repeats of seconds / numpy_seconds; None where the bare mean was too short to time.
        peak_mb: High-water mark of `aggregate` above its start.
        numpy_peak_mb: The same of the bare mean.
        note: Why there are fewer clients than were asked for, or what was exchanged.
    """

    strategy: str
    clients: int
    update_mb: float
    seconds: float
    numpy_seconds: float
    stream_seconds: float
    ratio: float | None
    peak_mb: float
    numpy_peak_mb: float
    note: str = ""

    def cells(self) -> tuple[str, ...]:
        ratio = "-" if self.ratio is None else f"{self.ratio:.1f}"
        times = (f"{self.seconds:.2f}", f"{self.numpy_seconds:.2f}", ratio)
        memory = (f"{self.peak_mb:.0f}", f"{self.peak_mb / self.update_mb:.1f}")
        return (self.strategy, f"{self.clients:,}" + "*" * bool(self.note), f"{self.update_mb:.2f}", *times, *memory)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1000, help="updates of a round (default: %(default)s)")
    parser.add_argument("--mb", type=float, default=10.0, help="MB of a whole adapter in float32 (default: %(default)s)")
    parser.add_argument("--strategies", nargs="+", default=choices("strategy"), help="names from conf/strategy (default: all)")
    parser.add_argument("--repeats", type=int, default=3, help="passes of each side (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: %(default)s)")
    parser.add_argument("--max-gb", type=float, default=4.0, help="memory that a pass may take (default: %(default)s)")
    parser.add_argument("--max-s", type=float, default=60.0, help="seconds that a pass may take (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="also write OUT.json and OUT.md")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    flower.quiet()
    rows, refused, console = [], {}, Console()
    for name in args.strategies:
        try:
            strategy = strategy_of(name, args.clients)
            adapter = whole_adapter(args.mb, prompts=name in PROMPTS)
            stream = Stream(strategy, adapter)
            clients, why = affordable(stream, args.clients, args.max_gb * 1e3, args.max_s)
            rows.append(measure(name, stream, clients, args.repeats, why))
            console.print(f"{name}: {rows[-1].seconds:.2f} s, {rows[-1].peak_mb:.0f} MB, {clients:,} clients")
        except FedtuneError as no:
            refused[name] = str(no)
    size = whole_adapter(args.mb).nbytes / 1e6
    title = f"{args.clients:,} clients, {size:.1f} MB adapters, {args.threads} threads, {args.repeats} repeats"
    print_table(console, COLUMNS, [row.cells() for row in rows], title=title)
    remarks = [f"* {r.strategy}: {r.note}" for r in rows if r.note] + [f"not measured: {n}: {why}" for n, why in refused.items()]
    console.print(*remarks, sep="\n", highlight=False)
    if args.out:
        said = {"title": title, "rows": [dataclasses.asdict(r) for r in rows], "not_measured": refused}
        args.out.with_suffix(".json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
        args.out.with_suffix(".md").write_text(markdown(title, rows, remarks), encoding="utf-8")


def strategy_of(name: str, clients: int) -> Strategy:
    """The strategy as its file in conf/strategy has it, in an experiment that suits it as far as any LoRA experiment can.

    Raises:
        ConfigError: The method does not take updates of so many clients.
    """
    sgd = ["client.optimizer=sgd", "client.clip_norm=null"]  # what reads gradients off the steps asks for it, the others take it
    cohort = [f"clients_per_round={clients}", f"min_clients={clients}", "rounds=100"]
    method = ["peft=ptuning_v2", "strategy.ratio=1"] if name in PROMPTS else ["peft=lora", f"peft.rank={RANK}"]
    (job,) = compose(["devices=none", *method, f"strategy={name}", *cohort, *sgd])
    return make_strategy(job.config)


def whole_adapter(mb: float, *, prompts: bool = False) -> AdapterState:
    """LoRA on q and v of as many layers as come closest to `mb`, at least one; 10 MB are 38 layers. A is drawn, B is zero. Or a prompt a
    layer, keys and values of `TOKENS` tokens."""
    layers = max(1, round(mb * 1e6 / (4 * 2 * RANK * (WIDTH + WIDTH))))
    generator, tensors = torch.Generator().manual_seed(0), {}
    if prompts:
        layers = max(1, round(mb * 1e6 / (4 * TOKENS * 2 * WIDTH)))
        tensors = {f"layers.{i}.prompt": torch.randn(TOKENS, 2 * WIDTH, generator=generator) for i in range(layers)}
        return AdapterState(tensors, AdapterSpec(method="ptuning_v2"))
    modules = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(layers) for p in "qv"]
    for module in modules:
        tensors[f"{module}.lora_A"] = torch.randn(RANK, WIDTH, generator=generator) / WIDTH**0.5
        tensors[f"{module}.lora_B"] = torch.zeros(WIDTH, RANK)
    return AdapterState(tensors, AdapterSpec(method="lora", ranks=dict.fromkeys(modules, RANK), scaling=dict.fromkeys(modules, 2.0)))


class Stream:
    """The updates of round 1, made one at a time.

    Args:
        strategy: Whose round it is.
        adapter: The run's first adapter.
    """

    def __init__(self, strategy: Strategy, adapter: AdapterState) -> None:
        self.strategy, self.state = strategy, strategy.start(adapter)
        plan = Plan(round=1, client="c00000", base_version=0, optimizer="sgd", clip_norm=None)
        given = strategy.plan(1, [plan], self.state)[plan.client]
        self.turn = given.plan.turn
        self.wanted = given.expect or given.adapter.subset(matching(given.adapter.tensors, given.plan.send))
        count = sum(t.numel() for t in self.wanted.tensors.values())
        self._noise = 0.02 * torch.randn(count + _WINDOWS, generator=torch.Generator().manual_seed(1))

    def __call__(self, clients: int) -> Iterator[Update]:
        for k in range(clients):
            tensors, at = {}, k * _STRIDE % _WINDOWS
            for name, like in self.wanted.tensors.items():
                tensors[name] = self._noise[at : at + like.numel()].clone().view(like.shape)
                at += like.numel()
            yield Update(
                client=f"c{k:05d}",
                round=1,
                base_version=0,
                adapter=self.wanted.replace(tensors),
                examples=1 + k * 37 % 200,
                metrics={"train_loss": 1.0, "start_loss": 1.0 + k % 7},
                measurements={"steps": 10, "lr_sum": 0.01, "seconds": 1.0},
            )

    def aggregate(self, clients: int) -> object:
        return self.strategy.aggregate(1, self.state, self(clients))


def numpy_mean(updates: Iterator[Update]) -> dict[str, np.ndarray]:
    """Σ n w / Σ n as anybody would write it: no checks, float32, one update at a time."""
    total: dict[str, np.ndarray] = {}
    examples = 0
    for update in updates:
        for name, tensor in update.adapter.tensors.items():
            weighted = update.examples * tensor.numpy()
            if name in total:
                total[name] += weighted
            else:
                total[name] = weighted
        examples += update.examples
    return {name: value / examples for name, value in total.items()}


def drain(updates: Iterator[Update]) -> None:
    for _ in updates:
        pass


def cost(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and the high-water mark in MB above what the process held before."""
    give_back()
    reset_peak(_CPU)
    before, start = peak_mb(_CPU), time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    above = peak_mb(_CPU) - before
    del result
    return seconds, above


def give_back() -> None:
    """Ask the C library to hand freed memory to the system, so that the next pass cannot hide in it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own; elsewhere the mark may come out too low
    if trim is not None:
        trim(0)


def affordable(stream: Stream, clients: int, max_mb: float, max_s: float) -> tuple[int, str]:
    """The cohort that fits, found by fours from 16 up, and why it is smaller than `clients`; "" where it is not."""
    n = min(_FIRST, clients)
    stream.aggregate(n)  # warms up: what is imported or allocated only once
    while n < clients:
        seconds, mb = cost(lambda n=n: stream.aggregate(n))
        following = min(_STEP * n, clients)
        grown = following / n
        if mb * grown > max_mb:
            return n, f"{clients:,} clients would take about {mb * clients / n / 1e3:.2g} GB, shown are {n:,}"
        if seconds * grown > max_s:
            return n, f"{clients:,} clients would take {seconds * clients / n:.0f} s or more, shown are {n:,}"
        n = following
    return n, ""


def measure(name: str, stream: Stream, clients: int, repeats: int, note: str) -> Row:
    """The three sides in turn, `repeats` times."""
    sides: dict[str, Callable[[], object]] = {
        "stream": lambda: drain(stream(clients)),
        "numpy": lambda: numpy_mean(stream(clients)),
        "ours": lambda: stream.aggregate(clients),
    }
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    peaks = dict.fromkeys(sides, 0.0)
    for _ in range(repeats):
        for side, work in sides.items():
            took, mb = cost(work)
            seconds[side].append(took)
            peaks[side] = max(peaks[side], mb)
    alone = seconds["stream"]
    net = {s: [max(t - a, 0.0) for t, a in zip(seconds[s], alone, strict=True)] for s in ("numpy", "ours")}
    ratios = [a / b for a, b in zip(net["ours"], net["numpy"], strict=True) if b > 0]
    return Row(
        strategy=name,
        clients=clients,
        update_mb=stream.wanted.nbytes / 1e6,
        seconds=statistics.median(net["ours"]),
        numpy_seconds=statistics.median(net["numpy"]),
        stream_seconds=statistics.median(alone),
        ratio=statistics.median(ratios) if ratios else None,
        peak_mb=peaks["ours"],
        numpy_peak_mb=peaks["numpy"],
        note="; ".join(n for n in (note, "" if stream.turn == PLAIN else f"turn {stream.turn}") if n),
    )


def markdown(title: str, rows: Sequence[Row], remarks: Sequence[str]) -> str:
    lines = [title, "", f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    lines += [f"| {' | '.join(row.cells())} |" for row in rows]
    lines += [line for remark in remarks for line in ("", remark.replace("*", "\\*"))]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
