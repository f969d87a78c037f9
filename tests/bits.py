"""Short runs that together use every turn, exchange, codec and task, and digests of their results.

    python -m tests.bits --write before.json      # at the commit to compare with
    python -m tests.bits --compare before.json    # at the other; prints the differences and exits with 1

A digest covers names, shapes, dtypes and bytes of the tensors: of the final adapter and of the shifts of the frozen weights. The runs use
one thread. Another processor may round differently, so no digests are stored here.
"""

import argparse
import contextlib
import hashlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fedtune.config.compose import compose
from fedtune.experiment import simulate
from tests.tiny import texts, tiny_llama, write_rows

NANO = ["conf=heterogeneous", "rounds=3", "clients_per_round=4", "min_clients=1", "client.steps=2", "eval.clients=2", "eval.where=none"]
EVEN = [*NANO, "devices=none", "peft=lora", "strategy=fedavg"]
FILE = ["conf=base", "data=local", "model=hub", "rounds=3", "clients_per_round=4", "task.max_length=16", "client.steps=2", "eval.clients=2"]
RUNS: dict[str, list[str]] = {
    "fedprox, top-k of int8 with feedback": [*EVEN, "strategy=fedprox", "traffic=topk", "traffic.up=int8"],
    "hetlora on devices": [*NANO, "strategy=hetlora", "strategy.tail_penalty=0.05", "strategy.tail_share=0.6"],
    "scaffold": [*EVEN, "strategy=scaffold", "client=sgd"],
    "slora, mask from gradients": [*EVEN, "strategy=slora", "strategy.mask=gradient", "rounds=4"],
    "fedpeptao": [*EVEN, "strategy=fedpeptao", "peft=ptuning_v2", "client.lr=0.24", "strategy.warmup_rounds=1", "rounds=5"],
    "fedprox, four at once": [*EVEN, "strategy=fedprox", "engine.batched=4"],
    "scaffold, four at once": [*EVEN, "strategy=scaffold", "client=sgd", "engine.batched=4"],
    "hetlora, four at once": [*EVEN, "strategy=hetlora", "strategy.tail_penalty=1e-3", "strategy.tail_share=0.6", "engine.batched=4"],
    "qfedavg": [*EVEN, "strategy=qfedavg"],
    "fedsa": [*EVEN, "strategy=fedsa"],
    "flora on devices": [*NANO, "strategy=flora"],
    "rows private, on devices": [*NANO, "strategy=fedavg", "peft=lora", "devices=none", "privacy=record", "client.batch_size=4"],
    "clients private at the server": [*EVEN, "privacy=user", "privacy.noise=0.1", "privacy.epsilon=null", "privacy.adaptive=true"],
    "clients private at themselves": [*EVEN, "privacy=user", "privacy.where=client", "privacy.noise=0.1", "privacy.epsilon=null"],
    "late replies count": [*NANO, "strategy=fedavg", "peft=lora", "late=use", "devices.deadline_s=12", "min_clients=1", "rounds=4"],
    "classification, adapters, bf16 both ways": [*FILE, "task=classification", "peft=adapter", "traffic=bf16", "traffic.down=bf16"],
    "causal_lm, ia3, nf4": [*FILE, "task=causal_lm", "peft=ia3", "traffic=nf4"],
    "full, fp16": [*FILE, "task=causal_lm", "peft=full", "traffic=fp16", "strategy=fedadam"],
    "the default scenario": ["conf=heterogeneous", "eval.where=none", "eval.clients=0"],
}


def digest(files: Iterable[Path]) -> str:
    """A digest of the tensors in these files, ordered by file and tensor names."""
    total = hashlib.sha256()
    for file in sorted(files):
        for name, tensor in sorted(load_file(file).items()):
            total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            total.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def run(overrides: list[str], folder: Path) -> dict[str, Any]:
    """Run to the end. Returns digests and the number of counted turns."""
    text, label = "data.columns.text=text", "data.columns.label=label"
    file = [f"model.name={folder / 'model'}", f"data.path={folder / 'rows.jsonl'}", f"data.test_path={folder / 'test.jsonl'}", text]
    file += [label] if "task=classification" in overrides else []
    batched = [] if any("batched" in o for o in overrides) else ["engine.batched=none"]  # auto depends on measured times
    common = ["engine.threads=1", *batched, "inference=none", "inference.samples=0", f"output_dir={folder / 'outputs'}"]
    last = {o.partition("=")[0]: o for o in [*overrides, *(file if "data=local" in overrides else []), *common]}
    (job,) = compose([*last.values()])
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        path = simulate(job.config)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    counted = sum("client" in line and "dropped" not in line and "bytes_up" in line for line in lines)
    shifts = [*(path / "adapter").glob("shift-*.safetensors")]
    return {"adapter": digest([path / "adapter" / "fedtune.safetensors"]), "shifts": digest(shifts), "turns": counted}


def main() -> int:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--write", type=Path, help="file for the digests")
    ask.add_argument("--compare", type=Path, help="digests to compare with")
    ask.add_argument("--only", default="", help="only runs whose name contains this")
    args = ask.parse_args()
    before = json.loads(args.compare.read_text(encoding="utf-8")) if args.compare else {}
    results, different = {}, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_llama(folder / "model")
        write_rows(folder / "rows.jsonl", texts(40))
        write_rows(folder / "test.jsonl", texts(8, seed=9))
        for title, overrides in RUNS.items():
            if args.only in title:
                begun = time.perf_counter()
                results[title] = run(overrides, folder)
                same = title not in before or before[title] == results[title]
                different += [] if same else [title]
                word = "made" if not before else "same" if same else "DIFFERENT"
                print(f"{word:9} {time.perf_counter() - begun:5.1f} s  {title}  {results[title]}", flush=True)
    if args.write:
        args.write.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
