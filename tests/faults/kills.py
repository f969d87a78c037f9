"""Kills at random instants from the first second of a fresh start: `python -m tests.faults.kills [--count 20] [--seed 0] [--fork]`.

Each trial starts from nothing: a server and two clients start, and one of the three gets a SIGKILL at a random time within the duration of
an uninterrupted run. It restarts with the same command, and the run must succeed. With a killed server, the adapter must be that of the
uninterrupted run. A client killed during its turn may miss that round; the adapter must then be that of a simulation without this turn.
Both clients must have installed the model of the last round. The exit code is the number of failed trials.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import torch

from fedtune.contracts.adapter_state import AdapterState
from fedtune.delivery.versions import Versions
from fedtune.inference.generate import generate_text
from tests.faults.deployment import Deployment, deploy, settings, write_rows
from tests.faults.forking import FORK, preload
from tests.faults.replay import BOUND, counted_clients, differences, replay

CLIENTS = ("anna", "bert")


def experiment(folder: Path) -> list[str]:
    options = [s for s in settings(folder / "rows", CLIENTS) if not s.startswith(("min_clients", "deliver"))]
    return [*options, "min_clients=1", "keep_checkpoints=100", "weights.max_share=1", "round_timeout_s=60"]


def fresh(folder: Path) -> list[str]:
    """The settings of a deployment in this folder, with its data."""
    write_rows(folder / "rows", CLIENTS)
    return experiment(folder)


def start(deployment: Deployment, victim: str) -> float:
    """Start all processes, the victim last. Returns the time of its start."""
    for name in ("server", *CLIENTS):
        if name != victim:
            restart(deployment, name)
    restart(deployment, victim)
    return time.monotonic()


def restart(deployment: Deployment, name: str) -> None:
    if name == "server":
        deployment.start_server()
    else:
        deployment.start_client(name)


def distance(a: AdapterState, b: AdapterState) -> float:
    return max(float(torch.sub(a[n], b[n]).abs().max()) for n in a.tensors) if list(a.tensors) == list(b.tensors) else float("inf")


def run_without_kills(folder: Path) -> tuple[AdapterState, float]:
    """The result and the duration of a run without kills."""
    with deploy(folder, CLIENTS, fresh(folder), signs=True) as deployment:
        began = start(deployment, "server")
        assert deployment.finish() == 0, deployment.output("server")[-2000:]
        assert not (missing := without_model(deployment)), missing
        return deployment.adapter(), time.monotonic() - began


def without_model(deployment: Deployment) -> str:
    """The first client without the last round's model, and the model that it has; "" if both have it."""
    rounds = max(record["round"] for record in deployment.rounds())  # type: ignore[type-var]
    for client in CLIENTS:
        versions = Versions(deployment.folder / "state" / client)
        current = versions.current()
        found = next((v.record for v in versions.names() if v.name == current), None)
        if found is None or found.round != rounds or not generate_text(versions.model(str(current)), "The", max_new_tokens=4):
            return f"{client} has {current or 'no model'}: {deployment.output('server')[-300:]!r} {deployment.output(client)[-300:]!r}"
    return ""


def run_with_kill(folder: Path, victim: str, after: float, expected: AdapterState) -> tuple[bool, str]:
    """Whether a run ends correctly if its victim is killed after these seconds, and its result."""
    given = fresh(folder)
    with deploy(folder, CLIENTS, given, signs=True) as deployment:
        began = start(deployment, victim)
        time.sleep(max(0.0, began + after - time.monotonic()))
        process = deployment.server if victim == "server" else deployment.clients[victim]
        assert process is not None
        ended = process.poll() is not None
        if not ended:
            process.kill()
            process.wait()
            restart(deployment, victim)
        if (code := deployment.finish()) != 0:
            return False, f"the server ended with {code}: {deployment.output('server')[-300:]!r}"
        if missing := without_model(deployment):
            return False, missing
        if "Traceback" in deployment.output("server") + "".join(deployment.output(c) for c in CLIENTS):
            return False, "a traceback was printed"
        far = distance(deployment.adapter(), expected)
        if far <= BOUND:
            return True, f"the uninterrupted run's adapter, to {far:.1e}" + " (it had ended)" * ended
        turns = counted_clients(deployment.run)
        if victim == "server":
            return False, f"{far:.1e} off the uninterrupted run: {turns}"
        steps = differences(deployment.run, replay(folder, given, turns))
        return max(steps.values()) <= BOUND, f"without {victim} in rounds {[r for r, who in turns.items() if r and victim not in who]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fork", action="store_true", help="fork the processes instead of starting them: all modules are imported once")
    args = parser.parse_args()
    if args.fork:
        os.environ[FORK] = "1"
        preload()
    rng, bad = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as place:
        expected, seconds = run_without_kills(Path(place) / "unbroken")
        print(f"uninterrupted: {seconds:.1f} s", flush=True)
        for i in range(args.count):
            victim, after = ("server", "anna")[i % 2], rng.uniform(0.0, seconds)
            good, outcome = run_with_kill(Path(place) / f"{i:02d}", victim, after, expected)
            bad += not good
            print(f"{i + 1:2d} {victim} killed after {after:4.1f} s: {'ok' if good else 'DEFECT'}, {outcome}", flush=True)
    print(f"{args.count - bad} of {args.count} succeeded at load {os.getloadavg()[1]:.1f}")
    return bad


if __name__ == "__main__":
    sys.exit(main())
