"""fedtune as an ordinary Flower app, for `flwr run .`: the server and client components named in pyproject.toml.

The bundle has metadata only; both components come from the installed fedtune. Flower's run config selects the experiment: `conf` is the
scenario, and `overrides` holds settings as on the command line of `python -m fedtune.sim`. Any Flower process may act for any client, so
clients keep no state in memory between turns, only in the run directory.
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
from fedtune.errors import ConfigError, user_message

if TYPE_CHECKING:  # imports torch
    from fedtune.experiment import EngineContext

_REGISTRATION_S = 5.0  # a simulation registers its nodes while the server app starts

server_app = ServerApp()
client_app = ClientApp()


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    """Run the experiment on Flower's grid.

    Raises:
        FedtuneError: The experiment cannot run. Flower shows the sentence in the run's details.
    """
    config = _config(*_run_config(context))
    from fedtune.experiment import run_experiment  # imports torch: only once the config is good
    from fedtune.rounds.membership import JoinPolicy

    def engine(context: "EngineContext") -> None:
        _count(grid, len(context.space.client_ids))
        context.serve(grid, JoinPolicy())

    run_experiment(config, engine, at=_folder(config, context.run_id))


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
    from fedtune.clients.declining import decline_on_error

    return decline_on_error(lambda m, c: _client(*_run_config(c), c.run_id)(m, c))(message, context)


@lru_cache(maxsize=1)
def _client(conf: str, overrides: str, run_id: int) -> ClientApp:
    """This process's client of one Flower run."""
    config = _config(conf, overrides)
    from fedtune.clients.app import make_client_app
    from fedtune.clients.host import ClientHost
    from fedtune.clients.store import Storage

    return make_client_app(ClientHost(config, Storage.in_folder(_folder(config, run_id) / "clients", config)))


def _count(grid: Grid, clients: int) -> None:
    """Warn about clients without a node: Flower's simulation has two nodes by default."""
    until = time.monotonic() + _REGISTRATION_S
    while (nodes := len(list(grid.get_node_ids()))) < clients and time.monotonic() < until:
        time.sleep(0.1)
    if nodes < clients:
        print(f"fedtune: {nodes} of {clients} clients have a SuperNode: --federation-config 'num-supernodes={clients}' gives one to each")


def _run_config(context: Context) -> tuple[str, str]:
    return str(context.run_config["conf"]), str(context.run_config["overrides"])


def _config(conf: str, overrides: str) -> Config:
    try:
        from fedtune.config.compose import compose
    except ModuleNotFoundError as bad:  # Flower is installed, and fedtune without what it trains with
        raise ConfigError(user_message(bad)) from None
    try:
        given = shlex.split(overrides)
    except ValueError as bad:
        raise ConfigError(f'cannot read overrides="{overrides}": {bad}') from None
    if other := [g for g in given if g.partition("=")[0] in ("conf", "engine", "engine.kind", "engine.batched")]:
        raise ConfigError(f"{other[0]} cannot be in overrides: flwr run sets the engine, and conf='NAME' sets the scenario")
    resumed = any(g.startswith("resume=") for g in given)
    (job,) = compose(given if resumed else [f"conf={conf}", *given])
    engine = dataclasses.replace(job.config.engine, kind="ray", batched="none")
    return check(dataclasses.replace(job.config, engine=engine))


def _folder(config: Config, run_id: int) -> Path:
    """The run directory, which the server creates and simulated clients find by the id of the Flower run."""
    return Path(config.resume) if config.resume else Path(config.output_dir) / config.name / f"flower-{run_id}"
