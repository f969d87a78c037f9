"""fedtune in a notebook or another program: compose a config, run it, look at what came out.

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
    """A run that has ended, or has been stopped.

    Args:
        path: Its directory.
    """

    path: Path

    @property
    def config(self) -> Config:
        """What it ran with."""
        return read_config(self.path)

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """One row a round, from 0: what was counted, what traveled, and scores where the round was evaluated."""
        return [row for row in self._metrics() if row.get("client") is None]

    @property
    def clients(self) -> list[dict[str, Any]]:
        """One row for each client and round that it was asked in."""
        return [row for row in self._metrics() if row.get("client") is not None]

    @property
    def adapter(self) -> "AdapterState":
        """The trained tensors, by name.

        Raises:
            CheckpointError: The run has not ended yet.
        """
        from fedtune.contracts.adapter_state import AdapterState

        file = self.path / "adapter" / "fedtune.safetensors"
        if not file.is_file():
            raise CheckpointError(f"{self.path} has no adapter yet: go on with resume={self.path}")
        return AdapterState.load(file)

    @property
    def report(self) -> Path:
        """The report, to be opened in a browser."""
        return self.path / "report.html"

    def _metrics(self) -> list[dict[str, Any]]:
        from fedtune.runs.report import read_metrics

        return read_metrics(self.path)


def configure(*settings: str) -> Config:
    """The config that these settings ask for, as on the command line: `conf=NAME`, `GROUP=CHOICE`, `KEY=VALUE`, or `resume=RUN`.

    Raises:
        ConfigError: A setting is not known, of the wrong type, out of bounds, or does not go with another.
        CheckpointError: `resume=RUN` is not a run directory.
    """
    (job,) = compose(settings)
    return job.config


def run(config: Config, *, strategy: "Strategy | None" = None, turns: "Mapping[str, type[Turn]] | None" = None) -> Result:
    """Simulate the experiment in this process, with a line of progress for each round on stderr.

    An interrupt (Ctrl-C, or a notebook's stop button) ends it with a KeyboardInterrupt that says how to go on; the process lives on.

    Args:
        config: The experiment; with `resume`, the run to go on with.
        strategy: An instance of your own; None is the config's.
        turns: Name → client half of a method of your own, which `strategy` asks for by that name.

    Raises:
        FedtuneError: The experiment cannot be run; one sentence says why.
    """
    from fedtune.clients.turns import register
    from fedtune.experiment import simulate

    if turns and config.engine.kind == "ray":
        raise ConfigError("turns that are written in this process are not known to Ray's workers: set engine=inprocess")
    for name, kind in (turns or {}).items():
        register(name, kind)
    if strategy is not None:
        kind = type(strategy)
        given = {f.name: getattr(strategy, f.name) for f in dataclasses.fields(strategy)} if dataclasses.is_dataclass(strategy) else {}
        told = {n: v for n, v in given.items() if isinstance(v, (str, int, float, bool, type(None)))}
        config = dataclasses.replace(config, strategy={"_target_": f"{kind.__module__}.{kind.__qualname__}", **told})
    return Result(simulate(check(config), strategy))


def load_run(path: Path | str) -> Result:
    """A run that was made before.

    Raises:
        CheckpointError: There is no run.
    """
    read_config(Path(path))
    return Result(Path(path))
