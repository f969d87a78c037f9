"""fedtune as an ordinary Flower app, for `flwr run .`: the two components that pyproject.toml names.

The bundle carries metadata only, so both components are those of the installed fedtune. What to run comes with Flower's run config: `conf`
names the scenario and `overrides` holds settings as on the command line of `python -m fedtune.sim`. Any of Flower's processes may act for
any client, so nothing is taken to be in memory from an earlier turn; what clients keep lies in the run's directory.
"""

import dataclasses
import shlex
import time
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedtune.config import Config, check
from fedtune.errors import ConfigError, sentence

if TYPE_CHECKING:  # imports torch
    from fedtune.experiment import Stage

_NODES_COME_S = 5.0  # a simulation registers its nodes while the server's app starts

server_app = ServerApp()
client_app = ClientApp()


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    """Run the experiment on Flower's grid.

    Raises:
        FedtuneError: It cannot be run, in one sentence; Flower shows it as the run's details.
    """
    config = _config(*_asked(context))
    from fedtune.experiment import conduct  # torch and the rest: only once the config is good
    from fedtune.rounds.membership import Welcome

    def engine(stage: "Stage") -> None:
        _count(grid, len(stage.space.client_ids))
        stage.serve(grid, Welcome())

    conduct(config, engine, at=_folder(config, context.run_id))


@client_app.query()
def hello(message: Message, context: Context) -> Message:
    return _answer(message, context)


@client_app.train()
def train(message: Message, context: Context) -> Message:
    return _answer(message, context)


@client_app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    return _answer(message, context)


def _answer(message: Message, context: Context) -> Message:
    from fedtune.clients.declining import declining

    return declining(lambda m, c: _client(*_asked(c), c.run_id)(m, c))(message, context)


@lru_cache(maxsize=1)
def _client(conf: str, overrides: str, run_id: int) -> ClientApp:
    """This process's client of one Flower run."""
    config = _config(conf, overrides)
    from fedtune.clients.app import make_client_app
    from fedtune.clients.host import ClientHost
    from fedtune.clients.store import Storage

    return make_client_app(ClientHost(config, Storage.in_folder(_folder(config, run_id) / "clients", config)))


def _count(grid: Grid, clients: int) -> None:
    """Say it if there are clients without a node: Flower's simulation brings two nodes unless it is told otherwise."""
    until = time.monotonic() + _NODES_COME_S
    while (nodes := len(list(grid.get_node_ids()))) < clients and time.monotonic() < until:
        time.sleep(0.1)
    if nodes < clients:
        print(f"fedtune: {nodes} of {clients} clients have a SuperNode: --federation-config 'num-supernodes={clients}' gives each one")


def _asked(context: Context) -> tuple[str, str]:
    return str(context.run_config["conf"]), str(context.run_config["overrides"])


def _config(conf: str, overrides: str) -> Config:
    try:
        from fedtune.config.compose import compose
    except ModuleNotFoundError as bad:  # Flower is installed, and fedtune without what it trains with
        raise ConfigError(sentence(bad)) from None
    try:
        given = shlex.split(overrides)
    except ValueError as bad:
        raise ConfigError(f'cannot read overrides="{overrides}": {bad}') from None
    if other := [g for g in given if g.partition("=")[0] in ("conf", "engine", "engine.kind", "engine.batched")]:
        raise ConfigError(f"{other[0]} has no place in overrides: flwr run brings the engine, and the scenario is named by conf='NAME'")
    resumed = any(g.startswith("resume=") for g in given)
    (job,) = compose(given if resumed else [f"conf={conf}", *given])
    engine = dataclasses.replace(job.config.engine, kind="ray", batched="none")
    return check(dataclasses.replace(job.config, engine=engine))


def _folder(config: Config, run_id: int) -> Path:
    """The run's directory, which the server makes and simulated clients find by the id of Flower's run."""
    return Path(config.resume) if config.resume else Path(config.output_dir) / config.name / f"flower-{run_id}"
