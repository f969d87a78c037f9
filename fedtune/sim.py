"""The simulation door: `python -m fedtune.sim conf=heterogeneous strategy=fedavg peft.rank=16`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from fedtune import __version__
from fedtune.compose import DEFAULT_SCENARIO, Job, compose, groups, make_strategy, scenarios
from fedtune.config import reference, to_dict
from fedtune.errors import ConfigError, FedtuneError, Stopped

USAGE = f"""\
python -m fedtune.sim [conf=NAME | conf=FILE.yaml] [KEY=VALUE ...] [--multirun] [--cfg]
python -m fedtune.sim resume=RUN [rounds=N]

  conf=NAME      the scenario; {DEFAULT_SCENARIO} where none is named
  conf=FILE      a scenario file of your own; groups in its folder are found too
  GROUP=CHOICE   take another file of a group, such as devices=none
  KEY=VALUE      set one value, such as rounds=3 or client.lr=2e-3
  resume=RUN     go on with the run directory RUN, from its newest good checkpoint
  -m, --multirun run every combination of KEY=A,B,C
  --cfg          print the composed config and stop
  --version, -h, --help
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the arguments (default: the process's own) ask for; returns the exit code: 2 is a refusal in one sentence, 130 stopped."""
    try:
        return _main(list(sys.argv[1:] if argv is None else argv))
    except FedtuneError as error:
        print(f"fedtune: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"fedtune: {stop if isinstance(stop, Stopped) else 'stopped before a run began'}", file=sys.stderr)
        return 130


def _main(argv: list[str]) -> int:
    flags = {a for a in argv if a.startswith("-")}
    if unknown := sorted(flags - {"-h", "--help", "-m", "--multirun", "--cfg", "--version"}):
        raise ConfigError(f"unknown flag {unknown[0]}: see --help")
    if flags & {"-h", "--help"}:
        print(help_text())
        return 0
    if "--version" in flags:
        print(f"fedtune {__version__}")
        return 0
    multirun = bool(flags & {"-m", "--multirun"})
    jobs = compose([a for a in argv if a not in flags], multirun=multirun)
    if "--cfg" in flags:
        import yaml

        print("---\n".join(yaml.safe_dump(to_dict(job.config), sort_keys=False, allow_unicode=True) for job in jobs), end="")
        return 0
    for job in jobs:
        make_strategy(job.config)  # a bad strategy is refused before the first job of a sweep, not after it
    from fedtune.app import simulate  # torch and the rest: only once the config is good

    if not multirun:
        simulate(jobs[0].config)
        return 0
    return _sweep(jobs)


def _sweep(jobs: Sequence[Job]) -> int:
    """Run job after job, then print what became of each; one that fails does not stop the others."""
    from rich.console import Console
    from rich.table import Table

    from fedtune.app import simulate

    table = Table("job", "settings", "run", "result", title="Sweep")
    failed = 0
    for number, job in enumerate(jobs, start=1):
        print(f"fedtune: job {number} of {len(jobs)}: {job.label}")
        try:
            path = simulate(job.config)
            table.add_row(str(number), job.label, str(path), _result(path))
        except FedtuneError as error:
            failed += 1
            print(f"fedtune: job {number}: {error}", file=sys.stderr)
            table.add_row(str(number), job.label, "–", f"failed: {error}")
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return 2 if failed else 0


def _result(path: Path) -> str:
    """The last value of the metric that the run is judged by."""
    from fedtune.report import read_metrics, summary

    records = read_metrics(path)
    metric = summary.primary_metric(records)
    last = [v for r in summary.rounds(records) if (v := summary.value(r, metric)) is not None]
    return f"{metric} {last[-1]:.4g}" if last else "–"


def help_text() -> str:
    """All that a user can ask for: usage, scenarios, groups with their choices, every key with its default."""
    rows = reference()
    lines = [USAGE, "Scenarios (conf=NAME)", *(f"  {name:<16}{what}" for name, what in scenarios().items()), ""]
    lines += ["Groups (GROUP=CHOICE)", *(f"  {name:<16}{', '.join(found)}" for name, found in groups().items()), ""]
    width = max(len(key) for key, _, _ in rows)
    lines += ["Keys (KEY=VALUE), default, meaning", *(f"  {key:<{width}}  {_short(default):<16}  {help}" for key, default, help in rows)]
    return "\n".join(lines)


def _short(default: str) -> str:
    default = "null" if default == "none" else default  # as it is typed; no key's default is the word none
    return default if len(default) <= 16 else default[:15] + "…"


if __name__ == "__main__":
    sys.exit(main())
