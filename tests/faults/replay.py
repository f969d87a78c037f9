"""The expected result of a deployment: the simulation in which exactly the clients with counted updates take part.

python -m tests.faults.replay RUN FOLDER SETTING ...      prints round → difference as JSON, in its last line
"""

import json
import sys
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedtune.clients.app import make_client_app
from fedtune.clients.declining import decline_reply
from fedtune.config.compose import compose
from fedtune.contracts.adapter_state import AdapterState
from fedtune.errors import Decline
from fedtune.experiment import EngineContext, client_host, run_experiment
from fedtune.rounds.membership import JoinPolicy
from fedtune.runs.report import read_metrics
from fedtune.simulations.engines.grid import InProcessGrid

BOUND = 1e-5


def counted_clients(run: Path) -> dict[int, set[str]]:
    """Round → clients with a counted update."""
    results: dict[int, set[str]] = {}
    for record in read_metrics(run):
        turn = results.setdefault(int(record["round"]), set())
        if record["client"] is not None and "bytes_up" in record and "dropped" not in record:
            turn.add(record["client"])
    return results


def replay(folder: Path, experiment: Sequence[str], participants: Mapping[int, Set[str]]) -> Path:
    """Run that simulation. Returns its run directory."""
    (job,) = compose([*experiment, f"output_dir={folder / 'replay'}", "engine.batched=none"])

    def engine(context: EngineContext) -> None:
        inner, names, app = make_client_app(client_host(context)), context.space.client_ids, ClientApp()

        @app.train()
        def turn(message: Message, context: Context) -> Message:
            name, round = names[int(context.node_config["partition-id"])], int(message.metadata.group_id)
            if name not in participants[round]:
                return decline_reply(message, Decline("absent", f"it was not counted in round {round}"))
            return inner(message, context)

        app.query()(inner)
        app.evaluate()(inner)
        context.serve(InProcessGrid(app, len(names)), JoinPolicy())

    return run_experiment(job.config, engine)


def differences(run: Path, expected: Path) -> dict[int, float]:
    """Round → largest difference between the adapters of both runs' checkpoints, for the rounds that both have stored."""
    out = {}
    for folder in sorted((run / "checkpoints").glob("round-*")):
        other = expected / "checkpoints" / folder.name
        if other.is_dir():
            a, b = AdapterState.load(folder / "adapter.safetensors"), AdapterState.load(other / "adapter.safetensors")
            same = list(a.tensors) == list(b.tensors)
            out[int(folder.name[6:])] = max(float(torch.sub(a[n], b[n]).abs().max()) for n in a.tensors) if same else float("inf")
    return out


def main() -> None:
    run, folder, *experiment = sys.argv[1:]
    print(json.dumps(differences(Path(run), replay(Path(folder), experiment, counted_clients(Path(run))))))


if __name__ == "__main__":
    main()
