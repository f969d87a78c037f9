"""A client that is too slow for its round, over a real network: its update counts in a later one, as in the simulation."""

import json
import time
from pathlib import Path

import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedtune.clients.app import make_client_app
from fedtune.config.compose import compose
from fedtune.experiment import EngineContext, client_host, run_experiment
from fedtune.rounds.membership import JoinPolicy
from fedtune.runs.report import read_metrics
from fedtune.simulations.engines.grid import InProcessGrid
from tests.faults.deployment import STORIES, deploy, settings, write_rows
from tests.faults.forking import in_own_process
from tests.faults.replay import BOUND, differences

CLIENTS, SLOW, ROUNDS, DEADLINE_S = ("anna", "bert", "carla"), "bert", 8, 20.0
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not STORIES.is_dir(), reason="needs FEDTUNE_DATA with models/stories260k and fed/tinyshakespeare"),
]


def run_simulation(folder: Path, experiment: list[str], staleness: int) -> Path:
    """The simulation in which the client's first reply is `staleness` rounds late."""
    (job,) = compose([*experiment, f"output_dir={folder}", "engine.batched=none", "devices.deadline_s=1"])

    def engine(context: EngineContext) -> None:
        inner, names, app = make_client_app(client_host(context)), context.space.client_ids, ClientApp()

        @app.train()
        def turn(message: Message, context: Context) -> Message:
            reply = inner(message, context)
            if names[int(context.node_config["partition-id"])] == SLOW and message.metadata.group_id == "1":
                record = reply.content.config_records["update"]
                update = json.loads(str(record["json"]))
                update["measurements"]["virtual_s"] = staleness + 0.5
                record["json"] = json.dumps(update)
            return reply

        app.query()(inner)
        app.evaluate()(inner)
        context.serve(InProcessGrid(app, len(names)), JoinPolicy())

    return run_experiment(job.config, engine)


@in_own_process
def test_a_late_update_counts_later_with_the_simulation_s_result(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows", CLIENTS)
    usual = [s for s in settings(tmp_path / "rows", CLIENTS) if not s.startswith(("rounds", "min_clients"))]
    experiment = [*usual, f"rounds={ROUNDS}", "min_clients=2", "late=use", f"max_staleness={ROUNDS}", f"round_timeout_s={DEADLINE_S:g}"]
    experiment += ["keep_checkpoints=100", "eval.clients=0", "client.schedule=constant", "weights.max_share=1"]
    points = tmp_path / "points"
    points.mkdir()
    (points / f"{SLOW}.training").touch()
    with deploy(tmp_path, CLIENTS, experiment) as deployment:
        deployment.start_server()
        for name in CLIENTS:
            deployment.start_client(name, launcher=["-m", "tests.faults.launch", name, str(points), "client"])
        end = time.monotonic() + 120
        while not (deployment.run / "metrics.jsonl").exists() or not any(r["round"] == 1 for r in deployment.rounds()):
            assert time.monotonic() < end, deployment.output("server")[-2000:]
            time.sleep(0.05)
        (points / f"{SLOW}.training.held").unlink()  # the first round has ended: let the client continue
        assert deployment.finish() == 0, deployment.output("server")[-2000:]
        rows = {(r["round"], r["client"]): r for r in read_metrics(deployment.run)}
        assert rows[1, SLOW]["dropped"] == f"late: no reply within {DEADLINE_S:g} s"
        (used,) = [r for r in rows.values() if r["client"] == SLOW and "staleness" in r]
        assert used["round"] == 1 + used["staleness"] and used["steps"] == 3 and used["bytes_up"] > 0
        assert rows[used["round"], None]["late_used"] == 1
        assert [rows[r, None]["cohort"] for r in range(1, ROUNDS + 1)] == [
            3,
            *[2] * used["staleness"],
            *[3] * (ROUNDS - 1 - used["staleness"]),
        ]
        off = differences(deployment.run, run_simulation(tmp_path / "wanted", experiment, int(used["staleness"])))
    assert set(off) == set(range(ROUNDS + 1)) and max(off.values()) <= BOUND, off
