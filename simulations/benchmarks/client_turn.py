"""Overhead of the framework: client turns in the in-process engine against a bare PyTorch + PEFT loop with the same steps.

    python -m fedtune.simulations.benchmarks.client_turn --clients 100 --repeats 5

All sides train the demo's homes on the nano backbone with one thread: the same rows in the same order, the same optimizer steps, the same
weighted mean. The bare loop has no messages, no checks, no checkpoints, no metrics. The sides alternate (A B C A B C ...), so that changes
in machine speed affect all of them; quote the ratio. Memory is the high-water mark of one round in a separate process.
"""

import argparse
import dataclasses
import json
import math
import multiprocessing
import statistics
import tempfile
import time
from typing import Any

import torch

from fedtune.clients.app import make_client_app
from fedtune.clients.host import ClientHost
from fedtune.clients.meter import peak_mb, reset_peak
from fedtune.clients.steps import batches
from fedtune.clients.store import Storage
from fedtune.clients.workspace import Workspace, workspace
from fedtune.config import Config, to_dict
from fedtune.config.compose import compose
from fedtune.data import collate
from fedtune.rounds.bridge import Bridge
from fedtune.rounds.planning import base_plan
from fedtune.runs.directory import RunDirectory
from fedtune.simulations.engines.grid import InProcessGrid
from fedtune.simulations.engines.together import Together
from fedtune.strategies.fedavg import FedAvg


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=100, help="clients per round (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps per turn (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds per side (default: %(default)s)")
    parser.add_argument(
        "--memory", type=int, nargs="*", default=[10, 100, 400], help="cohort sizes for the memory table (default: 10 100 400)"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = experiment(args.clients, args.steps)
    space = workspace(json.dumps(to_dict(config)))
    for client in space.client_ids:
        space.examples(client, "train")  # encoded once, for both sides
    sides = {"bare loop": bare_round, "fedtune, one by one": our_round, "fedtune, together": our_round_together}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for repeat in range(args.repeats + 1):
        states = {}
        for side, run in sides.items():
            start = time.perf_counter()
            states[side] = run(space)
            if repeat:  # the first round is a warm-up
                seconds[side].append(time.perf_counter() - start)
        bare = states["bare loop"]
        for side, state in states.items():
            moved, apart = (distance(bare, other) for other in (start_of(space), state))
            assert apart < 1e-3 * moved, f"{side} did not do the same work: {apart} of {moved}"
    print(f"{args.clients} clients, {args.steps} steps of {config.client.batch_size} rows, 1 thread, {args.repeats} rounds of each side")
    print("| side | ms per client turn: median | min | max |\n|---|---|---|---|")
    for side, values in seconds.items():
        ms = [1000 * v / args.clients for v in values]
        print(f"| {side} | {statistics.median(ms):.1f} | {min(ms):.1f} | {max(ms):.1f} |")
    for side in list(sides)[1:]:
        ratios = [a / b for a, b in zip(seconds["bare loop"], seconds[side], strict=True)]
        spread = f"(min {min(ratios):.2f}, max {max(ratios):.2f})"
        print(f"throughput of {side} over the bare loop: median {statistics.median(ratios):.2f} {spread}")
    print("\n| clients a round | peak MB of the round, in process |\n|---|---|")
    for clients in args.memory:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print(f"| {clients} | {pool.apply(memory_of, (clients, args.steps)):.0f} |")


def experiment(clients: int, steps: int) -> Config:
    (job,) = compose(
        [
            "devices=none",
            f"data.homes={clients}",
            "rounds=1",
            f"clients_per_round={clients}",
            f"client.steps={steps}",
            "client.epochs=null",
            "client.schedule=constant",
            "client.warmup_rounds=0",
            "eval.where=none",
            "eval.clients=0",
            "engine.threads=1",
        ]
    )
    return job.config


def bare_round(space: Workspace) -> dict[str, torch.Tensor]:
    """One round in plain PyTorch and PEFT: load, train, read, average."""
    config, model = space.config, space.live.model
    named = dict(space.live.parameters)
    params, start = list(named.values()), space.initial
    total, examples = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in named.items()}, 0
    model.train()
    for client in space.client_ids:
        rows, plan = space.examples(client, "train"), base_plan(config, 1, client, 0)
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(start[name])
        optimizer = torch.optim.AdamW(params, lr=plan.lr, weight_decay=plan.weight_decay)
        order = batches(len(rows), plan.batch_size, plan.seed)
        for _ in range(plan.steps or 0):
            model(**collate([rows[i] for i in next(order)], space.pad_id)).loss.backward()
            torch.nn.utils.clip_grad_norm_(params, plan.clip_norm or 1e9)
            optimizer.step()
            optimizer.zero_grad()
        for name, parameter in named.items():
            total[name] += len(rows) * parameter.detach().double()
        examples += len(rows)
    model.eval()
    return {n: (t / examples).float() for n, t in total.items()}


class _Silence:
    """A run observer that ignores everything."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args: None


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float((a[n] - b[n]).square().sum()) for n in a))


def start_of(space: Workspace) -> dict[str, torch.Tensor]:
    """The initial adapter of every side."""
    return dict(space.initial.tensors)


def our_round_together(space: Workspace) -> dict[str, torch.Tensor]:
    """As `our_round`, with `engine.batched=auto`."""
    return our_round(space, "auto")


def our_round(space: Workspace, batched: str = "none") -> dict[str, torch.Tensor]:
    """One round through bridge, messages, ClientApp, checks, aggregation and checkpoint."""
    host = ClientHost(space.config, Storage.temporary(space.config), loaded=space)
    together = None if batched == "none" else Together(host, batched)
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(space.config, output_dir=folder)
        run = RunDirectory.create(config)
        bridge = Bridge(
            grid=InProcessGrid(make_client_app(host), len(space.client_ids), together),
            strategy=FedAvg(),
            config=config,
            run=run,
            initial=space.initial,
            found=None,
            metric=("exact_match", True),
            evaluate=None,
            observer=_Silence(),  # type: ignore[arg-type]
        )
        state = bridge.loop()
        run.close()
    return dict(state.adapter.tensors)


def memory_of(clients: int, steps: int) -> float:
    torch.set_num_threads(1)
    space = workspace(json.dumps(to_dict(experiment(clients, steps))))
    for client in space.client_ids:
        space.examples(client, "train")
    reset_peak(torch.device("cpu"))
    our_round(space)
    return peak_mb(torch.device("cpu"))


if __name__ == "__main__":
    main()
