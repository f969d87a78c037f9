"""Server cost of a round: aggregating 1,000 clients' adapters of 10 MB, by strategy, against a bare weighted mean in NumPy.

    python -m fedtune.simulations.benchmarks.server_cost --clients 1000 --mb 10 --out server_cost

Each strategy gets the tensors that its clients send in round 1: LoRA of rank 16 on q and v, with as many layers of width 1024 as the size
needs, or the part of it that the method sends (phase sparse: SLoRA's masked entries). FedPepTAO gets a prompt of 32 tokens per layer,
without scores. The stream creates updates one at a time and keeps none. They are copies of windows of one noise buffer, so that an update
that the strategy keeps costs memory. Draining the stream alone is timed as a third side and subtracted from the other two. The three sides
alternate (A B C A B C ...), so that changes in machine speed affect all of them; quote the ratio. The bare mean adds n · w in float32.
fedtune adds in float64, so that the mean of a single client equals its update bit for bit.

Memory is the high-water mark of a pass above the memory in use before it, after freed memory is returned to the system. "in updates" is
this memory divided by that of an update: a few if the method aggregates the stream, the whole cohort if it needs all updates at once. If a
method would exceed --max-gb or --max-s with the full cohort, the table shows the largest cohort (16, 64, 256 ...) that fits.
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
PROMPTS = ("fedpeptao",)  # strategies that only exchange prompts
_WINDOWS, _STRIDE = 8191, 997
_FIRST, _STEP = 16, 4  # enough clients for every robust rule
_CPU = torch.device("cpu")
COLUMNS = ("strategy", "clients", "MB an update", "s a round", "NumPy s", "x NumPy", "peak MB", "in updates")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One strategy's cost: medians over the repeats. Net seconds exclude those of the stream.

    Args:
        strategy: The strategy's name.
        clients: Updates of the round.
        update_mb: MB (10^6 bytes) of one update.
        seconds: Net seconds of `aggregate`.
        numpy_seconds: Net seconds of the bare mean.
        stream_seconds: Seconds of the stream alone.
        ratio: Median over the repeats of seconds / numpy_seconds; None if the bare mean was too short to time.
        peak_mb: High-water mark of `aggregate` above the memory before it.
        numpy_peak_mb: The same for the bare mean.
        note: Why there are fewer clients than requested, or the turn, unless it is plain.
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
    parser.add_argument("--clients", type=int, default=1000, help="updates per round (default: %(default)s)")
    parser.add_argument("--mb", type=float, default=10.0, help="MB of a float32 adapter (default: %(default)s)")
    parser.add_argument("--strategies", nargs="+", default=choices("strategy"), help="names from conf/strategy (default: all)")
    parser.add_argument("--repeats", type=int, default=3, help="passes per side (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: %(default)s)")
    parser.add_argument("--max-gb", type=float, default=4.0, help="maximum memory of a pass (default: %(default)s)")
    parser.add_argument("--max-s", type=float, default=60.0, help="maximum seconds of a pass (default: %(default)s)")
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
        summary = {"title": title, "rows": [dataclasses.asdict(r) for r in rows], "not_measured": refused}
        args.out.with_suffix(".json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        args.out.with_suffix(".md").write_text(markdown(title, rows, remarks), encoding="utf-8")


def strategy_of(name: str, clients: int) -> Strategy:
    """Return the strategy of conf/strategy, for a LoRA (or prompt) experiment with settings that most strategies accept.

    Raises:
        ConfigError: The strategy rejects the experiment, for example the number of clients.
    """
    sgd = ["client.optimizer=sgd", "client.clip_norm=null"]  # required by strategies that infer gradients from steps
    cohort = [f"clients_per_round={clients}", f"min_clients={clients}", "rounds=100"]
    method = ["peft=ptuning_v2", "strategy.ratio=1"] if name in PROMPTS else ["peft=lora", f"peft.rank={RANK}"]
    (job,) = compose(["devices=none", *method, f"strategy={name}", *cohort, *sgd])
    return make_strategy(job.config)


def whole_adapter(mb: float, *, prompts: bool = False) -> AdapterState:
    """Return LoRA on q and v, with the number of layers that comes closest to `mb`, at least one; 10 MB are 38 layers. A is random, B is
    zero. With `prompts`, return keys and values of `TOKENS` tokens for each layer instead."""
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
    """The updates of round 1, created one at a time.

    Args:
        strategy: Plans the round.
        adapter: The run's initial adapter.
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
    """Σ n w / Σ n in plain NumPy: no checks, float32, one update at a time."""
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
    """Run `work`. Returns its seconds, and the high-water mark in MB above the memory before it."""
    give_back()
    reset_peak(_CPU)
    before, start = peak_mb(_CPU), time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    above = peak_mb(_CPU) - before
    del result
    return seconds, above


def give_back() -> None:
    """Return freed memory to the system; reusing it would hide the memory of the next pass."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only in glibc; with other C libraries the mark may be too low
    if trim is not None:
        trim(0)


def affordable(stream: Stream, clients: int, max_mb: float, max_s: float) -> tuple[int, str]:
    """Return the cohort size that fits (16, 64, 256 ..., at most `clients`), and why it is below `clients`; "" if it is not."""
    n = min(_FIRST, clients)
    stream.aggregate(n)  # warms up: imports, and memory that is allocated only once
    while n < clients:
        seconds, mb = cost(lambda n=n: stream.aggregate(n))
        following = min(_STEP * n, clients)
        grown = following / n
        if mb * grown > max_mb:
            return n, f"{clients:,} clients would take about {mb * clients / n / 1e3:.2g} GB; the table shows {n:,}"
        if seconds * grown > max_s:
            return n, f"{clients:,} clients would take {seconds * clients / n:.0f} s or more; the table shows {n:,}"
        n = following
    return n, ""


def measure(name: str, stream: Stream, clients: int, repeats: int, note: str) -> Row:
    """Run the three sides alternately, `repeats` times."""
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
