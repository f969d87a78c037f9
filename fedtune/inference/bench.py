"""Measures a model's speed on this machine, and its share of the memory-bandwidth limit: `fedtune bench MODEL`.

Decoding one sequence reads every weight once per token, so bandwidth divided by the bytes read is the maximum of tokens per second. The
bandwidth is measured too, by summing an array that does not fit any cache.
"""

import json
import os
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedtune.config.bounds import require
from fedtune.contracts.seeds import derive_seed
from fedtune.errors import ConfigError, DataError
from fedtune.inference.engine.caches.base import Span
from fedtune.inference.engine.decoder import describe_passes, linears_of, parameters_held
from fedtune.inference.engine.generate import Generation, Report, Speculation
from fedtune.inference.engine.load import Engine, load_engine
from fedtune.inference.engine.make_linear import describe_path
from fedtune.inference.engine.sample import Sampling
from fedtune.inference.engine.speculate import Drafter
from fedtune.inference.engine.speculate.adapt import Adapt
from fedtune.inference.engine.speculate.draft import DraftModel
from fedtune.inference.engine.speculate.early_exit import EarlyExit
from fedtune.inference.engine.speculate.lookup import Lookup
from fedtune.inference.engine.threads import set_threads, threads

ARRAY = 256 << 20  # bytes summed to measure the bandwidth: larger than the caches


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """The measurements; lists have one value per repeat.

    Attributes:
        linears: Which kernels run the linear layers; if torch's do, why.
        passes: Whether native code or torch runs the rest of the layers; if torch does, why.
        load_s: Seconds to load the model.
        prefill_tok_per_s: Speed of the prompt.
        decode_tok_per_s: Speed of plain decoding.
        first_token_ms: Time to the first new token.
        peak_mb: Peak resident memory of this process, including libraries, in 10^6 bytes.
        weights_mb: Weights read per token, in 10^6 bytes.
        bandwidth_gb_per_s: Measured bandwidth, in 10^9 bytes per second.
        limit_tok_per_s: Decoding limit by the bandwidth.
        share_of_limit: Median decoding speed divided by the limit.
        speculation: Per drafter ("none": plain decoding of the same answers): `tok_per_s`, `acceptance` (accepted share of draft tokens)
            and `tokens_per_pass`.
    """

    model: str
    kind: str
    linears: str
    passes: str
    threads: int
    prompt_tokens: int
    new_tokens: int
    load_s: float
    prefill_tok_per_s: list[float]
    decode_tok_per_s: list[float]
    first_token_ms: list[float]
    peak_mb: float
    weights_mb: float
    bandwidth_gb_per_s: float
    limit_tok_per_s: float
    share_of_limit: float
    speculation: dict[str, dict[str, float]]


def bench(
    folder: Path,
    *,
    kind: str | None = None,
    prompt_tokens: int = 128,
    new_tokens: int = 128,
    repeats: int = 5,
    seed: int = 0,
    draft: Path | None = None,
    speculate: bool = False,
    text: Path | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> Speeds:
    """Measure a model.

    Args:
        folder: An edge package or a Hugging Face folder.
        kind: fp32, bf16, int8 or int4; None keeps the model's format.
        prompt_tokens: Random prompt tokens per repeat.
        new_tokens: Greedy tokens per repeat.
        repeats: Number of repeats, after a warm-up.
        seed: Seed of the prompts.
        draft: A draft model, to measure too.
        speculate: Measure prompt lookup and early exit.
        text: File whose lines are the prompts for speculation; None samples prompts from the model.
        report: Called with the current step.

    Raises:
        ConfigError: A number is out of range, or prompt and new tokens exceed the model's context.
        ModelError: The model cannot be loaded or is not supported.
    """
    for name, value in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens), ("repeats", repeats)):
        require(name, value, ge=1)
    report("loading")
    start = time.perf_counter()
    engine = load_engine(folder, kind)
    load_s = time.perf_counter() - start
    if prompt_tokens + new_tokens > engine.shape.context:
        raise ConfigError(
            f"{prompt_tokens} prompt tokens and {new_tokens} new tokens exceed the model's context of {engine.shape.context}: use fewer"
        )
    numbers = np.random.default_rng(derive_seed(seed, "bench"))
    prefill, decode, first = [], [], []
    for repeat in range(repeats + 1):
        report(f"repeat {repeat} of {repeats}" if repeat else "warming up")
        ids = numbers.integers(engine.shape.vocab, size=prompt_tokens)
        took, rest = one_answer(engine, ids, new_tokens)
        if repeat:
            prefill.append(prompt_tokens / took)
            first.append(1000 * took)
            decode.append(new_tokens / rest)
    ways: dict[str, Callable[[], Drafter]] = {"lookup": Lookup, "early exit": EarlyExit} if speculate else {}
    memory = peak_mb()  # without the draft model
    if draft:
        ways["draft"] = partial(DraftModel, load_engine(draft, kind), engine)
    seen = speculation(engine, ways, prompts(engine, text, repeats, prompt_tokens, seed), new_tokens, report) if ways else {}
    report("bandwidth")
    weights, speed = bytes_read(engine), bandwidth()
    return Speeds(
        model=str(folder),
        kind=engine.decoder.layers[0].down.kind,
        linears=describe_path(linears_of(engine.decoder)),
        passes=describe_passes(engine.decoder),
        threads=threads(),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        load_s=load_s,
        prefill_tok_per_s=prefill,
        decode_tok_per_s=decode,
        first_token_ms=first,
        peak_mb=memory,
        weights_mb=weights / 1e6,
        bandwidth_gb_per_s=speed / 1e9,
        limit_tok_per_s=speed / weights,
        share_of_limit=statistics.median(decode) * weights / speed,
        speculation=seen,
    )


def one_answer(engine: Engine, ids: NDArray[np.int64], new: int) -> tuple[float, float]:
    """Seconds to the first new token, and for `new` greedy ones after it."""
    cache = engine.cache(limit=len(ids) + new)
    engine.start(cache)
    start = time.perf_counter()
    token = engine.decoder.forward(ids, [Span(cache, len(ids))]).argmax(-1)
    middle = time.perf_counter()
    for _ in range(new):
        token = engine.decoder.forward(token, [Span(cache, 1)]).argmax(-1)
    return middle - start, time.perf_counter() - middle


def prompts(engine: Engine, text: Path | None, count: int, length: int, seed: int) -> list[list[int]]:
    """Token rows of prompts: lines of the file, else samples of the model at temperature 1.

    Raises:
        DataError: The file cannot be read or is empty.
    """
    if text is None:
        begin = (
            [derive_seed(seed, "prompt", i) % engine.text.size for i in range(count)]
            if engine.text.bos is None
            else [engine.text.bos] * count
        )
        how = [Sampling(temperature=1.0, seed=derive_seed(seed, "prompt", i)) for i in range(count)]
        answers = [Generation(engine, [first], one, length) for first, one in zip(begin, how, strict=True)]
        return [[first, *(piece.token for piece in answer)] for first, answer in zip(begin, answers, strict=True)]
    try:
        lines = [line for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as bad:
        raise DataError(f"cannot read {text}: {getattr(bad, 'strerror', None) or 'it is not UTF-8 text'}") from None
    if not lines:
        raise DataError(f"{text} has no text: give one line per prompt")
    return [engine.text.encode(lines[i % len(lines)])[:length] for i in range(count)]


def speculation(
    engine: Engine, ways: Mapping[str, Callable[[], Drafter]], rows: Sequence[list[int]], new: int, report: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """Measure greedy answers to the same prompts without speculation and with each drafter, in turn.

    Each answer has a new drafter, which knows no earlier answer, because prompts may repeat. The measured costs are kept.
    """
    adapts = {way: Adapt() for way in ways}
    reports: dict[str, list[Report]] = {way: [] for way in ("none", *ways)}
    for i, row in enumerate(rows, 1):
        for way in reports:
            report(f"speculation, {way}: answer {i} of {len(rows)}")
            how = Speculation(ways[way](), adapts[way]) if way in ways else None
            answer = Generation(engine, row, Sampling(), new, speculation=how)
            for _ in answer:
                pass
            reports[way].append(answer.report)
    return {
        way: {
            "tok_per_s": statistics.median(r.speed for r in seen),
            "acceptance": sum(r.accepted for r in seen) / max(1, sum(r.drafted for r in seen)),
            "tokens_per_pass": sum(r.tokens - 1 for r in seen) / max(1, sum(r.passes for r in seen)),
        }
        for way, seen in reports.items()
    }


def bytes_read(engine: Engine) -> int:
    """Bytes of weights read per token: all but the embedding table, of which only one row is read."""
    held = parameters_held(engine.decoder)
    return held["linears"] + held["head"]


def bandwidth(repeats: int = 5) -> float:
    """Memory bandwidth of the engine's threads, in bytes per second: the best of several sums over an array larger than the caches."""
    array = np.ones(ARRAY // 8)
    parts = np.array_split(array, threads())
    seconds = []
    for _ in range(repeats + 1):
        workers = [threading.Thread(target=part.max) for part in parts]  # numpy computes without the interpreter's lock
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        seconds.append(time.perf_counter() - start)
    return array.nbytes / min(seconds[1:])


def peak_mb() -> float:
    """Peak resident memory of this process, in 10^6 bytes."""
    import resource  # lazy: not on every system

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def table(speeds: Speeds) -> str:
    """A table with one line per figure; repeated figures with minimum and maximum."""

    def several(values: Sequence[float], unit: str) -> str:
        return f"{statistics.median(values):.1f} {unit} ({min(values):.1f}–{max(values):.1f})"

    rows = {
        "model": f"{speeds.model}, {speeds.kind}, {speeds.threads} thread{'s' * (speeds.threads > 1)}",
        "linear layers": speeds.linears,
        "passes": speeds.passes,
        f"prefill, {speeds.prompt_tokens} tokens": several(speeds.prefill_tok_per_s, "tok/s"),
        f"decode, {speeds.new_tokens} tokens": several(speeds.decode_tok_per_s, "tok/s"),
        "first token": several(speeds.first_token_ms, "ms"),
        "load": f"{speeds.load_s:.2f} s",
        "peak memory": f"{speeds.peak_mb:.0f} MB, including libraries; a token reads {speeds.weights_mb:.1f} MB of weights",
        "bandwidth limit": f"{speeds.limit_tok_per_s:.1f} tok/s at {speeds.bandwidth_gb_per_s:.1f} GB/s; "
        f"decode reaches {100 * speeds.share_of_limit:.0f} %",
    }
    for way, seen in speeds.speculation.items():
        kept = f"; {100 * seen['acceptance']:.0f} % of draft tokens accepted, {seen['tokens_per_pass']:.2f} tokens per pass"
        rows[f"speculation, {way}"] = f"{seen['tok_per_s']:.1f} tok/s{kept if way != 'none' else ''}"
    width = max(len(name) for name in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def write(speeds: Speeds, out: Path) -> None:
    """Write `bench.json` and `bench.png` to a folder."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench.json").write_text(json.dumps(asdict(speeds), indent=1) + "\n", encoding="utf-8")
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    bars = {("no speculation" if way == "none" else way): [seen["tok_per_s"]] for way, seen in speeds.speculation.items()}
    bars = {"decode": speeds.decode_tok_per_s, **bars}
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), width_ratios=[1, 2])
    for axis, shown in ((left, {"prefill": speeds.prefill_tok_per_s}), (right, bars)):
        middle = [statistics.median(v) for v in shown.values()]
        spread = [
            [m - min(v) for m, v in zip(middle, shown.values(), strict=True)],
            [max(v) - m for m, v in zip(middle, shown.values(), strict=True)],
        ]
        drawn = axis.bar(list(shown), middle, yerr=spread, capsize=4, width=0.6)
        axis.bar_label(drawn, fmt="%.0f", padding=2)
        axis.set_ylabel("tokens per second")
        axis.margins(y=0.15)
    top = max(max(v) for v in bars.values())
    if speeds.limit_tok_per_s < 4 * top:
        right.axhline(speeds.limit_tok_per_s, linestyle="--", color="0.4")
    right.set_title(f"memory bandwidth limit: {speeds.limit_tok_per_s:.0f} with one token per pass", fontsize=8)
    figure.suptitle(f"{Path(speeds.model).name}, {speeds.kind}, {speeds.threads} thread{'s' * (speeds.threads > 1)}", fontsize=10)
    figure.tight_layout()
    figure.savefig(out / "bench.png", dpi=110)
    plt.close(figure)


def use_threads(wanted: int | None) -> None:
    """Set the engine's number of threads; None does not change it.

    Raises:
        ConfigError: Fewer than one, or more than four times the cores.
    """
    require("threads", wanted, ge=1, le=4 * (os.cpu_count() or 1))
    if wanted is not None:
        set_threads(wanted)
