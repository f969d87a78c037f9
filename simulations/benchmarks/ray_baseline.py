"""fedtune's in-process engine against Flower's Ray simulation with a trainer per client, as in FlowerTune's client.

    python -m fedtune.simulations.benchmarks.ray_baseline --clients 100

The baseline is Flower's own simulation engine on all cores. For each message it loads the backbone, wraps it with PEFT, sets the adapter,
builds a `transformers.Trainer`, runs the steps, and returns the adapter. fedtune runs the scenario `heterogeneous` without devices, in one
process. Both train the demo's homes on the nano backbone for one round, with the same rows and steps. The baseline's time excludes starting
Ray and loading torch: it starts after one turn of each worker. The sides alternate. Other models and shapes: `benchmarks.batched --ray`.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from fedtune.clients.meter import peak_mb, reset_peak
from fedtune.clients.workspace import workspace
from fedtune.config import to_dict
from fedtune.contracts import flower
from fedtune.data import Example
from fedtune.models.quiet import quiet
from fedtune.simulations.benchmarks.client_turn import experiment, our_round_together


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The model and training of the baseline's client.

    Args:
        folder: The checkpoint.
        labels: Number of classes; 0 for a causal LM.
        dtype: Data type of the backbone.
        steps: Optimizer steps per turn.
    """

    folder: str
    labels: int = 0
    dtype: torch.dtype = torch.float32
    steps: int


@dataclass(frozen=True, kw_only=True)
class Round:
    """The work of a round: batch size, and each client's examples."""

    batch: int
    examples: Sequence[Sequence[Example]]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Wall-clock seconds of a round, and peak MB of all workers: their number times the largest one's peak."""

    seconds: float
    mb: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=100, help="clients per round (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps per turn (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="batch size in rows (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="rounds per side (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    config = experiment(args.clients, args.steps)
    config.client.batch_size = args.batch
    space = workspace(json.dumps(to_dict(config)))
    work = Round(batch=args.batch, examples=[space.examples(c, "train") for c in space.client_ids])
    ours, theirs = [], []
    our_round_together(space)  # warms up, and chooses the number of clients trained at once
    for _ in range(args.repeats):
        start = time.perf_counter()
        our_round_together(space)
        ours.append(time.perf_counter() - start)
        theirs.append(baseline(Recipe(folder=str(space.backbone.folder), steps=args.steps), [work], workers=os.cpu_count() or 1)[0].seconds)
    print(f"{args.clients} clients, {args.steps} steps of {args.batch} rows, {os.cpu_count()} cores, {args.repeats} rounds of each side")
    print(f"Ray, a trainer a client: {statistics.median(theirs):.1f} s a round ({', '.join(f'{t:.1f}' for t in theirs)})")
    print(f"fedtune, in process:     {statistics.median(ours):.1f} s a round ({', '.join(f'{t:.1f}' for t in ours)})")
    print(f"ratio: {statistics.median([b / a for a, b in zip(ours, theirs, strict=True)]):.1f}")


def baseline(recipe: Recipe, rounds: Sequence[Round], workers: int) -> list[Cost]:
    """Measure the cost of each round on Ray, all in one simulation.

    Args:
        recipe: The client's model and training.
        rounds: The work of each round, with the same number of clients.
        workers: Number of Ray workers, of one thread each.
    """
    clients, costs, server = len(rounds[0].examples), list[Cost](), ServerApp()
    start = {n: p.detach().float().numpy() for n, p in trainable(build(recipe)).items()}

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        while len(nodes := list(grid.get_node_ids())) < clients:
            time.sleep(0.1)
        ask(grid, nodes[:workers], 0)  # loads torch in the workers
        for number in range(len(rounds)):
            began = time.perf_counter()
            mb = ask(grid, nodes, number)
            costs.append(Cost(seconds=time.perf_counter() - began, mb=workers * mb))

    def ask(grid: Grid, nodes: list[int], number: int) -> float:
        arrays = ArrayRecord(dict(zip(start, ArrayRecord(list(start.values())).values(), strict=True)))
        work = [ConfigRecord({"rows": f"{number}-{k}.json", "batch": rounds[number].batch}) for k in range(len(nodes))]
        messages = [Message(RecordDict({"a": arrays, "c": c}), node, "train") for c, node in zip(work, nodes, strict=True)]
        replies = list(grid.send_and_receive(messages))
        failed = [r.error.reason for r in replies if r.has_error()]
        assert not failed, failed[0]
        return max(float(str(r.content.config_records["c"]["mb"])) for r in replies)

    with tempfile.TemporaryDirectory() as folder:
        for number, work in enumerate(rounds):
            for k, examples in enumerate(work.examples):
                rows = [(e.input_ids.tolist(), e.labels.tolist()) for e in examples[: recipe.steps * work.batch]]
                Path(folder, f"{number}-{k}.json").write_text(json.dumps(rows))
        each = max(1, (os.cpu_count() or 1) // workers)  # cores that Ray reserves per worker
        flower.quiet()
        run_simulation(
            server,
            client_app(recipe, Path(folder)),
            num_supernodes=clients,
            backend_config={
                "client_resources": {"num_cpus": each, "num_gpus": 0.0},
                "init_args": {"num_cpus": os.cpu_count() or 1, "logging_level": "error", "log_to_driver": False},
            },
        )
    return costs


def build(recipe: Recipe) -> Any:
    """Load the model from disk and add an adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    with quiet():
        if recipe.labels:
            model = AutoModelForSequenceClassification.from_pretrained(recipe.folder, num_labels=recipe.labels, dtype=recipe.dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(recipe.folder, dtype=recipe.dtype)
        kind = "SEQ_CLS" if recipe.labels else "CAUSAL_LM"
        return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type=kind))


def trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def client_app(recipe: Recipe, folder: Path) -> ClientApp:
    """Return a client that builds everything again for each message.

    Args:
        recipe: Its model and training.
        folder: Contains the clients' rows.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        from transformers import Trainer, TrainingArguments

        torch.set_num_threads(1)
        reset_peak(torch.device("cpu"))
        asked = message.content.config_records["c"]
        mine: Any = [{"input_ids": i, "labels": w} for i, w in json.loads((folder / str(asked["rows"])).read_text())]
        model = build(recipe)
        live = trainable(model)
        sent = message.content.array_records["a"].to_torch_state_dict()
        with torch.no_grad():
            for p, tensor in zip(live.values(), sent.values(), strict=True):
                p.copy_(tensor)

        def pad(examples: Any) -> dict[str, torch.Tensor]:
            width = max(len(e["input_ids"]) for e in examples)
            ids = [e["input_ids"] + [0] * (width - len(e["input_ids"])) for e in examples]
            mask = [[1] * len(e["input_ids"]) + [0] * (width - len(e["input_ids"])) for e in examples]
            labels = [e["labels"] if recipe.labels else e["labels"] + [-100] * (width - len(e["labels"])) for e in examples]
            classes = torch.tensor(labels)
            return {
                "input_ids": torch.tensor(ids),
                "labels": classes[:, 0] if recipe.labels else classes,
                "attention_mask": torch.tensor(mask),
            }

        with tempfile.TemporaryDirectory() as out:
            how = TrainingArguments(
                output_dir=out,
                per_device_train_batch_size=int(str(asked["batch"])),
                max_steps=recipe.steps,
                learning_rate=1e-3,
                max_grad_norm=1.0,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
                remove_unused_columns=False,
            )
            Trainer(model=model, args=how, train_dataset=mine, data_collator=pad).train()
        back = ArrayRecord({n: p.detach().float().clone() for n, p in live.items()})
        return Message(RecordDict({"a": back, "c": ConfigRecord({"mb": peak_mb(torch.device("cpu"))})}), reply_to=message)

    return app


if __name__ == "__main__":
    main()
