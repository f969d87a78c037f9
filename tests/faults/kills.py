"""Kills at random instants from the first second of a fresh start: `python -m tests.faults.kills [--count 20] [--seed 0] [--fork]`.

Each time everything is fresh: a server and two clients start, one of the three gets a SIGKILL at an instant drawn over the whole of an
unbroken run, is started again with the same command, and the run must end well. Killed servers must come to the unbroken run's adapter.
A client that is killed in its turn may miss that round: then the run must come to the simulation in which it missed it. The exit code is
the number of runs that did not.
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
from tests.faults.deployment import Deployment, deployed, settings, write_rows
from tests.faults.forking import FORK, preload
from tests.faults.replay import BOUND, counted, differences, replay

CLIENTS = ("anna", "bert")


def experiment(folder: Path) -> list[str]:
    made = [s for s in settings(folder / "rows", CLIENTS) if not s.startswith("min_clients")]
    return [*made, "min_clients=1", "keep_checkpoints=100", "weights.max_share=1", "round_timeout_s=60"]


def fresh(folder: Path) -> list[str]:
    """The settings of a deployment in this folder, with its rows."""
    write_rows(folder / "rows", CLIENTS)
    return experiment(folder)


def start(made: Deployment, victim: str) -> float:
    """Start all, the victim last, and say when it was."""
    for name in ("server", *CLIENTS):
        if name != victim:
            again(made, name)
    again(made, victim)
    return time.monotonic()


def again(made: Deployment, name: str) -> None:
    if name == "server":
        made.start_server()
    else:
        made.start_client(name)


def off(a: AdapterState, b: AdapterState) -> float:
    return max(float(torch.sub(a[n], b[n]).abs().max()) for n in a.tensors) if list(a.tensors) == list(b.tensors) else float("inf")


def unbroken(folder: Path) -> tuple[AdapterState, float]:
    """What it comes to where nobody is killed, and how long it takes."""
    with deployed(folder, CLIENTS, fresh(folder)) as deployment:
        began = start(deployment, "server")
        assert deployment.finish() == 0, deployment.said("server")[-2000:]
        return deployment.adapter(), time.monotonic() - began


def broken(folder: Path, victim: str, after: float, wanted: AdapterState) -> tuple[bool, str]:
    """Whether a run whose victim is killed so many seconds after its start ends well, and what came of it."""
    given = fresh(folder)
    with deployed(folder, CLIENTS, given) as deployment:
        began = start(deployment, victim)
        time.sleep(max(0.0, began + after - time.monotonic()))
        process = deployment.server if victim == "server" else deployment.clients[victim]
        assert process is not None
        ended = process.poll() is not None
        if not ended:
            process.kill()
            process.wait()
            again(deployment, victim)
        if (code := deployment.finish()) != 0:
            return False, f"the server ended with {code}: {deployment.said('server')[-300:]!r}"
        if "Traceback" in deployment.said("server") + "".join(deployment.said(c) for c in CLIENTS):
            return False, "a traceback was printed"
        far = off(deployment.adapter(), wanted)
        if far <= BOUND:
            return True, f"the unbroken run's adapter, to {far:.1e}" + " (it had ended)" * ended
        turns = counted(deployment.run)
        if victim == "server":
            return False, f"{far:.1e} off the unbroken run: {turns}"
        steps = differences(deployment.run, replay(folder, given, turns))
        return max(steps.values()) <= BOUND, f"without {victim} in rounds {[r for r, who in turns.items() if r and victim not in who]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fork", action="store_true", help="fork the processes instead of starting them: all their imports are paid once")
    args = parser.parse_args()
    if args.fork:
        os.environ[FORK] = "1"
        preload()
    rng, bad = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as place:
        wanted, seconds = unbroken(Path(place) / "unbroken")
        print(f"unbroken: {seconds:.1f} s", flush=True)
        for i in range(args.count):
            victim, after = ("server", "anna")[i % 2], rng.uniform(0.0, seconds)
            good, said = broken(Path(place) / f"{i:02d}", victim, after, wanted)
            bad += not good
            print(f"{i + 1:2d} {victim} killed after {after:4.1f} s: {'ok' if good else 'DEFECT'}, {said}", flush=True)
    print(f"{args.count - bad} of {args.count} ended well at load {os.getloadavg()[1]:.1f}")
    return bad


if __name__ == "__main__":
    sys.exit(main())
