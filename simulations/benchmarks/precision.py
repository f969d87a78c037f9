"""Cost of a frozen backbone in each precision: memory and seconds of loading and of a training step, and loss of quality.

    python -m fedtune.simulations.benchmarks.precision
    python -m fedtune.simulations.benchmarks.precision --sizes tiny 0.4b --checkpointing
    python -m fedtune.simulations.benchmarks.precision --sizes 0.4b --precisions fp32 nf4 nf4-lean --threads 1
    FEDTUNE_DATA=path/to/data python -m fedtune.simulations.benchmarks.precision --text --seeds 0 1 --out docs/precision.md

The models are random Llamas with LoRA r=8 on all linear layers. Each cell runs in its own process. "first load" creates the cache of a
quantized backbone, "load" is a later start. Peaks are high-water marks of the process's resident memory. They include "libraries", the
memory of Python, PyTorch and other packages before the load, and pages of mapped files, which the system may reclaim. "weights" is the size
of the backbone's tensors, "activations" of the tensors that a forward pass saves for the backward pass. The step of the model "tiny"
estimates the runtime's fixed memory: the last column is the ratio to fp32 after subtracting it.

PEFT's modules compute the steps, or with `-lean` fedtune's lean step (client.lean=auto). "PEFT / lean" is the CPU seconds of a step with
PEFT's modules divided by those of a lean step: medians of steps that alternate in one process.

--text trains instead: stories260k on Shakespeare and MiniLM on Banking77 (conf/shakespeare.yaml, conf/banking77.yaml) in each precision. It
compares the final metric with that of fp32 and the same seed. The bounds are 2 % of nats, and one point of accuracy. The curves are plotted
beside --out.
"""

import argparse
import contextlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:  # a cell measures the memory of these imports
    from fedtune.clients.turns import Work
    from fedtune.config import TaskConfig
    from fedtune.data import Example
    from fedtune.models import LiveAdapter

SIZES = {  # hidden, layers, heads, intermediate, vocabulary
    "tiny": (128, 2, 2, 256, 2048),
    "20m": (384, 8, 6, 1024, 16000),
    "125m": (768, 12, 12, 2560, 32000),
    "0.4b": (1024, 24, 16, 3584, 32000),
}
PRECISIONS = ("fp32", "bf16", "nf4", "int8")
COLUMNS = (
    "libraries MB",
    "weights MB",
    "activations MB",
    "first load MB",
    "first load s",
    "load MB",
    "load s",
    "step MB",
    "step s",
    "PEFT / lean",
)
LEAN = "-lean"
TEXT = (  # scenario, metric, its name, allowed loss against fp32, rounds, rounds between evaluations
    ("shakespeare", "loss", "nats", 0.02, 10, 1),
    ("banking77", "accuracy", "accuracy", 0.01, 40, 5),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES), help="backbones (default: all)")
    parser.add_argument(
        "--precisions", nargs="+", default=list(PRECISIONS), choices=[*PRECISIONS, *(p + LEAN for p in PRECISIONS)],
        help="default: all, with PEFT's modules",
    )  # fmt: skip
    parser.add_argument(
        "--compute", default="auto", choices=["auto", "bf16", "fp32"], help="data type of nf4 and int8 products (default: %(default)s)"
    )
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--shape", default="4x128", metavar="BxT", help="examples × tokens per step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="steps, including one warm-up step (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 uses all cores")
    parser.add_argument("--text", action="store_true", help="train on real text in each precision instead")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="seeds of --text (default: 0)")
    parser.add_argument("--out", type=Path, help="Markdown file to append the output to, row by row")
    parser.add_argument("--folder", help=argparse.SUPPRESS)  # set for a cell's process
    parser.add_argument("--part", choices=["make", "load", "step"], help=argparse.SUPPRESS)
    args, extra = parser.parse_known_args()
    if args.part:
        cell(args)
        return
    if args.text:
        if any(p.endswith(LEAN) for p in args.precisions):
            parser.error(f"--text takes precisions without {LEAN}: add client.lean=auto or none to the command")
        on_text(args, extra)
        return
    if extra:
        parser.error(f"unknown: {' '.join(extra)}")
    say = sayer(args.out, "Memory of a training step")
    say(f"{args.shape}, {args.threads or torch.get_num_threads()} threads, compute={args.compute}, checkpointing={args.checkpointing}\n")
    say(f"| model | precision | {' | '.join(COLUMNS)} | step / fp32 | above tiny / fp32 |\n|{'---|' * (len(COLUMNS) + 4)}")
    floor: dict[str, float] = {}  # precision → the runtime's fixed memory, MB
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            whole = None
            in_process(args, size, "fp32", folder, "make")
            for precision in args.precisions:
                first = in_process(args, size, precision, folder, "load") if precision in ("nf4", "int8") else {}
                found = {f"first {k}": v for k, v in first.items()} | in_process(args, size, precision, folder, "step")
                step = found["step MB"]
                whole = step if precision == "fp32" else whole
                if size == "tiny":
                    floor[precision] = step
                ratio = f"{step / whole:.2f}" if whole else "–"
                net = "–"
                if whole and size != "tiny" and {"fp32", precision} <= floor.keys():
                    net = f"{(step - floor[precision]) / (whole - floor['fp32']):.2f}"
                shown = ["–" if c not in found else f"{found[c]:.0f}" if c.endswith("MB") else f"{found[c]:.2f}" for c in COLUMNS]
                say(f"| {size} | {precision} | {' | '.join(shown)} | {ratio} | {net} |")


def sayer(out: Path | None, title: str) -> Callable[[str], None]:
    """Return a function that prints a line and appends it to the file; starts a section with the command."""

    def say(text: str) -> None:
        print(text, flush=True)
        if out:
            with out.open("a", encoding="utf-8") as f:
                f.write(text + "\n")

    command = f"python -m fedtune.simulations.benchmarks.precision {shlex.join(sys.argv[1:])}"
    say(f"\n## {title}\n\n```\n{command}\n```")
    return say


def in_process(args: argparse.Namespace, size: str, precision: str, folder: str, part: str) -> dict[str, float]:
    """Return the measurements of a cell's part, from a separate process."""
    command = [sys.executable, "-m", "fedtune.simulations.benchmarks.precision", "--part", part, "--folder", folder, "--sizes", size]
    command += ["--precisions", precision, "--compute", args.compute, "--shape", args.shape, "--steps", str(args.steps)]
    command += ["--threads", str(args.threads), *(["--checkpointing"] if args.checkpointing else [])]
    done = subprocess.run(command, env={**os.environ, "XDG_CACHE_HOME": f"{folder}/cache"}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def cell(args: argparse.Namespace) -> None:
    """Create the checkpoint, load it, or load it and train a few steps; prints the measurements as JSON."""
    if args.threads:
        torch.set_num_threads(args.threads)
    folder = Path(args.folder) / "model"
    rows, length = map(int, args.shape.split("x"))
    if args.part == "make":
        make(folder, args.sizes[0], max(length, 64))
        print("{}")
        return
    from fedtune.models.light import import_models

    import_models()  # as a device's worker does
    from fedtune.clients.meter import peak_mb, reset_peak
    from fedtune.clients.trainer import train
    from fedtune.clients.turns import Work
    from fedtune.config import ModelConfig, PeftConfig, TaskConfig
    from fedtune.contracts.plan import Plan
    from fedtune.data import Example
    from fedtune.models import LiveAdapter, lean, load_backbone

    cpu, task = torch.device("cpu"), TaskConfig(kind="causal_lm", max_length=length)
    model = ModelConfig(
        source="hub",
        name=str(folder),
        precision=args.precisions[0].removesuffix(LEAN),
        compute=args.compute,
        checkpointing=args.checkpointing,
        device="cpu",
    )
    if model.precision in ("nf4", "int8"):
        import fedtune.models.quantize  # noqa: F401  (counts as libraries)
    out = {"libraries MB": peak_mb(cpu)}
    reset_peak(cpu)
    start = time.perf_counter()
    backbone = load_backbone(model, task)
    out |= {"load s": time.perf_counter() - start, "load MB": peak_mb(cpu)}
    out["weights MB"] = sum(t.nbytes for t in (*backbone.model.parameters(), *backbone.model.buffers())) / 1e6
    if args.part == "step":
        live = LiveAdapter(backbone, PeftConfig(rank=8), task)
        is_lean = args.precisions[0].endswith(LEAN)
        if is_lean:
            lean.enable(live)
        rng, words = np.random.default_rng(0), backbone.model.config.get_text_config().vocab_size
        drawn = [rng.integers(3, words, length).astype(np.int32) for _ in range(rows)]
        plan = Plan(round=1, client="0", base_version=0, steps=1, batch_size=rows, lr=1e-4, lr_last=1e-4, seed=0)
        examples = [Example(d, d) for d in drawn]
        work = Work(live=live, start=live.read(version=0), plan=plan, task=task, examples=examples, pad_id=1)
        seconds = []
        reset_peak(cpu)
        for _ in range(args.steps):
            seconds.append(train(work).seconds)
            # `train` resets the high-water mark at each turn; all turns are alike
        out |= {"step MB": peak_mb(cpu), "step s": statistics.median(seconds[1:] or seconds)}
        out["activations MB"] = kept_mb(live, examples, task)
        if is_lean:
            out["PEFT / lean"] = faster(live, work, args.steps)
    print(json.dumps(out))


def faster(live: "LiveAdapter", work: "Work", pairs: int) -> float:
    """CPU seconds of a step with PEFT's modules over those of a lean step: medians of alternating steps, after one warm-up of each."""
    from fedtune.clients.trainer import train
    from fedtune.models import lean

    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(pairs + 1):
        for is_lean, spent in seconds.items():
            (lean.enable if is_lean else lean.disable)(live)
            start = time.process_time()
            train(work)
            spent.append(time.process_time() - start)
    peft, own = (statistics.median(spent[1:]) for spent in seconds.values())
    return peft / own


def kept_mb(live: "LiveAdapter", examples: "Sequence[Example]", task: "TaskConfig") -> float:
    """MB that a forward pass saves for the backward pass; counts each storage once, and no weights."""
    from fedtune.data import collate
    from fedtune.models import loss_sum

    model = live.model.train()
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        memory = t.untyped_storage()
        if memory.data_ptr() not in weights:
            kept[memory.data_ptr()] = memory.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss, _ = loss_sum(model, collate(examples, 1), task)
    del loss  # only now are saved tensors freed, so that no address is reused while counting
    return sum(kept.values()) / 1e6


def make(folder: Path, size: str, context: int) -> None:
    """Create a random float32 checkpoint with the tokenizer of the embedded backbone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from fedtune.models.checkpoint import NANO

    hidden, layers, heads, inner, words = SIZES[size]
    config = LlamaConfig(
        vocab_size=words, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
        intermediate_size=inner, max_position_embeddings=context, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((NANO / file).read_bytes())


def on_text(args: argparse.Namespace, extra: list[str]) -> None:
    """Compare LoRA's final metric in each precision with fp32's, and plot the curves."""
    from fedtune.simulations.studies.real import hardware, mean_and_spread

    curves: dict[tuple[str, str], list[list[tuple[int, float]]]] = {}  # scenario, precision → per seed (round, metric)
    say = sayer(args.out, "Quality on real text")
    say(f"{hardware()}; mean ± standard deviation over the seeds.\n")
    say("| study | precision | before | after | against fp32 | bound | seconds per run |\n|---|---|---|---|---|---|---|")
    for scenario, key, name, bound, rounds, every in TEXT:
        for precision in ("fp32", *(p for p in args.precisions if p != "fp32")):
            settings = [f"model.precision={precision}", f"model.compute={args.compute}", f"rounds={rounds}", f"eval.every={every}"]
            settings.append("eval.clients=0")
            start = time.perf_counter()
            mine = curves[scenario, precision] = [curve([f"conf={scenario}", *settings, f"seed={k}", *extra], key) for k in args.seeds]
            seconds = (time.perf_counter() - start) / len(args.seeds)
            worse = [against(one[-1][1], whole[-1][1], name) for one, whole in zip(mine, curves[scenario, "fp32"], strict=True)]
            loss = f"{mean_and_spread([100 * w for w in worse], 1)} {'% of nats' if name == 'nats' else 'points'} worse"
            ok = "kept" if statistics.fmean(worse) <= bound else "not kept"
            ends = [mean_and_spread([one[i][1] for one in mine]) for i in (0, -1)]
            say(f"| {scenario}, {name} | {precision} | {' | '.join(ends)} | {loss} | {ok} | {seconds:.0f} |")
    if args.out:
        plot(curves, picture := args.out.with_suffix(".png"))
        say(f"\n![curves]({picture.name})")


def curve(overrides: list[str], key: str) -> list[tuple[int, float]]:
    """Simulate a run. Returns its (round, metric on the global test)."""
    from fedtune.config.compose import compose
    from fedtune.experiment import simulate
    from fedtune.runs.report import read_metrics

    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the table
        folder = simulate(compose(overrides)[0].config)
    return [(r["round"], r[key]) for r in read_metrics(folder) if r["client"] is None and r.get(key) is not None]


def against(found: float, whole: float, name: str) -> float:
    """Loss against fp32: relative for nats, absolute for accuracy."""
    return (found - whole) / whole if name == "nats" else whole - found


def plot(curves: Mapping[tuple[str, str], list[list[tuple[int, float]]]], path: Path) -> None:
    """Plot the mean over the seeds: a panel per study, a line per precision."""
    import matplotlib.pyplot as plt  # late: a cell that measures memory does not need it

    figure, axes = plt.subplots(1, len(TEXT), figsize=(5 * len(TEXT), 3.8))
    for axis, (scenario, _, name, *_) in zip(axes, TEXT, strict=True):
        for (study, precision), runs in curves.items():
            if study == scenario:
                points = [(at[0][0], statistics.fmean(v for _, v in at)) for at in zip(*runs, strict=True)]
                axis.plot(*zip(*points, strict=True), label=precision, linestyle="--" if precision in ("nf4", "int8") else "-")
        axis.set(xlabel="round", ylabel=f"{name} on the test", title=scenario)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
