"""fedtune in a notebook or another program: compose a config, run it, and read the results.

import fedtune

config = fedtune.configure("conf=heterogeneous", "rounds=5", "strategy=fedavg", "devices=none")
result = fedtune.run(config)
result.rounds[-1]["exact_match"], result.adapter, result.report
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.config import Config, check
from fedtune.config.compose import compose
from fedtune.config.stored import read_config
from fedtune.errors import CheckpointError, ConfigError

if TYPE_CHECKING:  # these import torch
    from fedtune.clients.turns import Turn
    from fedtune.contracts.adapter_state import AdapterState
    from fedtune.contracts.strategy import Strategy


@dataclass(frozen=True)
class Result:
    """A run that has ended or was stopped.

    Args:
        path: The run directory.
    """

    path: Path

    @property
    def config(self) -> Config:
        """The run's config."""
        return read_config(self.path)

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """One row per round, from 0: counted updates, bytes, and scores if the round was evaluated."""
        return [row for row in self._metrics() if row.get("client") is None]

    @property
    def clients(self) -> list[dict[str, Any]]:
        """One row per client and round in which it was asked to train or evaluate."""
        return [row for row in self._metrics() if row.get("client") is not None]

    @property
    def adapter(self) -> "AdapterState":
        """The trained tensors, by name.

        Raises:
            CheckpointError: The run has not ended.
        """
        from fedtune.contracts.adapter_state import AdapterState

        file = self.path / "adapter" / "fedtune.safetensors"
        if not file.is_file():
            raise CheckpointError(f"{self.path} has no adapter yet: continue the run with resume={self.path}")
        return AdapterState.load(file)

    def personal_adapter(self, client: str) -> "AdapterState":
        """A client's personal adapter after the last round, perhaps with larger ranks than `adapter`.

        Raises:
            CheckpointError: The run has not ended, or the client has no personal model.
        """
        from fedtune.export.personal import ClientState, personal_adapter
        from fedtune.models.adapter_folder import StoredAdapter

        return personal_adapter(StoredAdapter(state=self.adapter), ClientState(self.path / "clients", client))[0].state

    @property
    def report(self) -> Path:
        """Path of the HTML report."""
        return self.path / "report.html"

    def _metrics(self) -> list[dict[str, Any]]:
        from fedtune.runs.report import read_metrics

        return read_metrics(self.path)


def configure(*settings: str) -> Config:
    """Compose a config from settings as on the command line: `conf=NAME`, `GROUP=CHOICE`, `KEY=VALUE`, or `resume=RUN`.

    Raises:
        ConfigError: A setting is unknown, of the wrong type, out of range, or incompatible with another.
        CheckpointError: `resume=RUN` is not a run directory.
    """
    (job,) = compose(settings)
    return job.config


def run(config: Config, *, strategy: "Strategy | None" = None, turns: "Mapping[str, type[Turn]] | None" = None) -> Result:
    """Simulate the experiment in this process and print a line of progress per round to stderr.

    An interrupt (Ctrl-C, or a notebook's stop button) raises a KeyboardInterrupt that says how to resume; the process stays alive.

    Args:
        config: The experiment; `resume` names a run to continue.
        strategy: Your own strategy instance; None takes the config's.
        turns: Name → your own client half of a method, which `strategy` requests by this name.

    Raises:
        FedtuneError: The experiment cannot run; the message is one sentence.
    """
    from fedtune.clients.turns import register
    from fedtune.experiment import simulate

    if turns and config.engine.kind == "ray":
        raise ConfigError("Ray's workers cannot import turns that are defined in this process: set engine=inprocess")
    for name, kind in (turns or {}).items():
        register(name, kind)
    if strategy is not None:
        kind = type(strategy)
        given = {f.name: getattr(strategy, f.name) for f in dataclasses.fields(strategy)} if dataclasses.is_dataclass(strategy) else {}
        scalars = {n: v for n, v in given.items() if isinstance(v, (str, int, float, bool, type(None)))}
        config = dataclasses.replace(config, strategy={"_target_": f"{kind.__module__}.{kind.__qualname__}", **scalars})
    return Result(simulate(check(config), strategy))


def load_run(path: Path | str) -> Result:
    """Open an existing run.

    Raises:
        CheckpointError: There is no run at `path`.
    """
    read_config(Path(path))
    return Result(Path(path))
