"""Virtual clients on Ray, through Flower's own simulation engine, from the same ServerApp and ClientApp."""

import importlib.util
import os

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation

from fedtune import flower
from fedtune.config import EngineConfig
from fedtune.errors import ConfigError


def check_ray(engine: EngineConfig) -> None:
    """Whether Ray can run here, before anything is loaded.

    Raises:
        ConfigError: A worker asks for more CPUs than there are, or Ray is not installed.
    """
    cores = os.cpu_count() or 1
    if engine.ray_cpus > cores:
        raise ConfigError(f"engine.ray_cpus={engine.ray_cpus} is more than the {cores} cores of this machine: no worker could start")
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("engine=ray needs Ray: install it with pip install 'fedtune[ray]'")


def run_on_ray(server_app: ServerApp, client_app: ClientApp, nodes: int, engine: EngineConfig) -> None:
    """Run both apps on `nodes` virtual SuperNodes."""
    check_ray(engine)
    flower.quiet()
    run_simulation(
        server_app,
        client_app,
        num_supernodes=nodes,
        backend_config={
            "client_resources": {"num_cpus": engine.ray_cpus, "num_gpus": 0.0},
            "init_args": {"num_cpus": os.cpu_count() or 1, "logging_level": "error", "log_to_driver": False},
        },
    )
