"""The simulation command: `python -m fedtune.sim conf=heterogeneous strategy=fedavg peft.rank=16`."""

import dataclasses
import datetime
import secrets
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from fedtune.config import Config, reference, to_dict
from fedtune.config.compose import DEFAULT_SCENARIO, SweepJob, compose, groups, scenarios
from fedtune.config.stored import read_config
from fedtune.data import check_data
from fedtune.errors import ConfigError, FedtuneError, Stopped, user_message
from fedtune.rounds.find_strategy import make_strategy
from fedtune.version import __version__

USAGE = f"""\
python -m fedtune.sim [conf=NAME | conf=FILE.yaml] [KEY=VALUE ...]
                      [--multirun] [--cfg]
python -m fedtune.sim resume=RUN [rounds=N] [model.trust_remote_code=true]
                      [strategy._target_=CLASS]

  conf=NAME      the scenario (default: {DEFAULT_SCENARIO})
  conf=FILE      your own scenario file; its folder may hold groups too
  GROUP=CHOICE   choose a file of a config group, such as devices=none
  KEY=VALUE      set one value, such as rounds=3 or client.lr=2e-3
  resume=RUN     continue the run in directory RUN from its newest good
                 checkpoint; foreign code (a model's or a strategy class)
                 runs only if this command allows it
  -m, --multirun run every combination of KEY=A,B,C that has not finished,
                 and compare the runs
  --cfg          print the composed config and stop
  --version, -h, --help
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the simulation that `argv` (default: sys.argv) asks for. Returns the exit code: 2 for an error, 130 if stopped."""
    try:
        return _main(list(sys.argv[1:] if argv is None else argv))
    except Exception as bad:
        print(f"fedtune: {user_message(bad)}", file=sys.stderr)
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
    for job in jobs:  # refuse a bad file or column before anything is loaded
        check_data(job.config)
    for job in jobs:
        make_strategy(job.config)  # a bad strategy is refused before the first job of a sweep, not after it
    from fedtune.experiment import simulate  # torch and the rest: only once the config is good

    if not multirun:
        simulate(jobs[0].config)
        return 0
    return _sweep(jobs)


def _sweep(jobs: Sequence[SweepJob]) -> int:
    """Run the jobs one by one, then compare them. A failing job does not stop the others; a finished one is not repeated."""
    from fedtune.experiment import simulate
    from fedtune.runs.report import compare

    done: list[Path] = []
    failed: list[str] = []
    for number, job in enumerate(jobs, start=1):
        print(f"fedtune: job {number} of {len(jobs)}: {job.label}")
        try:
            if (path := _finished(job.config)) is not None:
                print(f"fedtune: job {number} has already finished, in {path}: delete that folder to run it again")
            else:
                path = simulate(job.config)
            done.append(path)
        except FedtuneError as error:
            failed.append(f"job {number} ({job.label}): {error}")
            print(f"fedtune: job {number}: {error}", file=sys.stderr)
    if done:
        first = jobs[0]
        out = Path(first.config.output_dir) / first.config.name / f"sweep-{datetime.datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
        found = compare.compare({path: read_config(path) for path in done})
        compare.write(found, out, first.fixed)
        compare.show(found, first.fixed)
        print(f"sweep    {out}")
    for one in failed:
        print(f"failed   {one}")
    return 2 if failed else 0


def _finished(config: Config) -> Path | None:
    """The directory of a finished run with exactly this config; None if there is none."""
    from fedtune.runs.report import compare

    wanted = dataclasses.replace(config, model=dataclasses.replace(config.model, trust_remote_code=False))  # as read_config reads it
    for path in sorted(p.parent for p in (Path(config.output_dir) / config.name).glob("*/config.yaml")):
        try:
            if read_config(path) == wanted and compare.finished(path, config):
                return path
        except FedtuneError:  # written by another version, or damaged
            continue
    return None


def help_text() -> str:
    """The help in 80 columns: usage, scenarios, groups with their choices, all keys with their defaults."""

    def entry(name: str, text: str) -> str:
        return _wrapped(f"  {name:<16}{text}", indent=18)

    lines = [USAGE, "Scenarios (conf=NAME)", *(entry(name, what) for name, what in scenarios().items()), ""]
    lines += ["Groups (GROUP=CHOICE)", *(entry(name, ", ".join(found)) for name, found in groups().items()), ""]
    lines += ["Keys (KEY=VALUE) with their defaults"]
    for key, default, help in reference():
        default = "null" if default == "none" else default  # written as in YAML; no default is the word none
        lines += [_wrapped(f"  {key} = {default}".rstrip(), indent=6), _wrapped(f"      {help}", indent=6)]
    return "\n".join(lines)


def _wrapped(line: str, indent: int) -> str:
    return textwrap.fill(line, 80, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
