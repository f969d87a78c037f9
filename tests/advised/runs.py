"""The advice of runs that stop, of resumed runs, and of `fedtune compare`."""

import errno
import fcntl
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedtune.config import EvalConfig, InferenceConfig, TaskConfig, from_dict, to_dict
from fedtune.errors import UpdateError
from fedtune.runs.directory import RunDirectory
from fedtune.runs.report import MetricsWriter, compare, write_report
from tests.advised.keys import quiet_server
from tests.advised.rows import Place, command, compose_once, error_of, follows
from tests.tiny import tiny_config


def make_run(path: Path, *settings: str, done: int = 2, metric: str = "accuracy") -> Path:
    """The parts of a run that `fedtune compare` reads."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(to_dict(compose_once(["rounds=2", *settings])[0].config)))
    lines = [{"round": r, "client": None, metric: r / 2, "loss": 1.0, "seconds": 3.0} for r in range(done + 1)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def pair(place: Place) -> dict[str, str]:
    made = {"one": make_run(place.folder / "one"), "two": make_run(place.folder / "two", "seed=1", metric="exact_match")}
    return {name: str(path) for name, path in made.items()}


command("choose one that all have with --metric", "fedtune compare {one} {two}", ready=pair, metric="loss")
command("does not report {}: choose another --metric", "fedtune compare {one} --metric perplexity", ready=pair, metric="loss")


@follows("cannot write the comparison to {}: {}; choose another folder")
def _(place: Place) -> Iterator[str]:
    run = make_run(place.folder / "one")
    yield place.run("fedtune", "compare", run, "--out", "/proc/no")
    yield place.run("fedtune", "compare", run, "--out", place.folder / "other")


@follows("there is no run to compare: give run directories")
def _(place: Place) -> Iterator[str]:
    run = make_run(place.folder / "outputs/heterogeneous/one")
    yield error_of(lambda: compare.compare({}))  # the command line requires a run
    yield place.run("fedtune", "compare", *run.parent.glob("*"))


@follows("have the same settings and seed {}: leave one out")
def _(place: Place) -> Iterator[str]:
    twins = [make_run(place.folder / name) for name in ("a", "b")]
    yield place.run("fedtune", "compare", *twins)
    for twin in twins:
        yield place.run("fedtune", "compare", twin)


@follows("{} line {} is damaged ({}): restore it or delete that line")
def _(place: Place) -> Iterator[str]:
    run = make_run(place.folder / "run")
    whole = (run / "metrics.jsonl").read_text()
    lines = whole.splitlines(keepends=True)
    lines.insert(1, "{\n")
    (run / "metrics.jsonl").write_text("".join(lines))
    output = place.run("fedtune", "compare", run)
    yield output
    del lines[int(re.findall(r" line (\d+) ", output)[0]) - 1]
    (run / "metrics.jsonl").write_text("".join(lines))
    yield place.run("fedtune", "compare", run)
    (run / "metrics.jsonl").write_text(whole)
    yield place.run("fedtune", "compare", run)


# -- real runs, of one or two rounds on a tiny backbone ----------------------------------------------------------------------------------


def scenario(place: Place) -> str:
    """The scenario file of a tiny experiment."""

    def make(path: Path) -> None:
        task, columns = TaskConfig(kind="instruction", max_length=32, max_new_tokens=4), {"prompt": "question", "answer": "reply"}
        inference = InferenceConfig(samples=1, export="hf")
        config = tiny_config(path, rounds=1, task=task, eval=EvalConfig(where="server", clients=0), inference=inference)
        config.data.columns = columns
        values = {k: v for k, v in to_dict(config).items() if k not in ("resume", "output_dir", "strategy")}
        (path / "mine.yaml").write_text(yaml.safe_dump(values | {"defaults": ["base", "_self_"]}))

    return f"conf={place.keep('tiny', make)}/mine.yaml"


def simulate(place: Place, *settings: str) -> str:
    return place.run("fedtune.sim", scenario(place), f"output_dir={place.folder}", *settings)


def one_round_run(place: Place) -> Path:
    """A copy of a run of one round."""

    def make(path: Path) -> None:
        assert not place.run("fedtune.sim", scenario(place), f"output_dir={path}")
        (path / "printed").write_text(place.printed)

    made = place.keep("ended", make)
    (run,) = (p.parent for p in made.rglob("config.yaml") if "merged" not in p.parts)
    return Path(shutil.copytree(run, place.folder / "ended"))


def setting_of(error: str, name: str = "resume") -> str:
    """The setting in a printed sentence."""
    match = re.search(rf"\b{name}=[^\s,;:]+", " ".join(error.split()).replace(f"{name}= ", f"{name}="))
    assert match, error
    return match.group()


@follows("has done {} of {} rounds: finish it with resume={}, or leave it out", slow=True)
def _(place: Place) -> Iterator[str]:
    run = one_round_run(place)
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("rounds: 1\n", "rounds: 2\n", 1))
    one = make_run(place.folder / "one", metric="exact_match")
    output = place.run("fedtune", "compare", run, one)
    yield output
    yield place.run("fedtune", "compare", one)
    yield place.run("fedtune.sim", setting_of(output))
    yield place.run("fedtune", "compare", run)


@follows("rounds={} is less than the {} rounds that {} has done: leave it out or raise it", slow=True)
def _(place: Place) -> Iterator[str]:
    run = one_round_run(place)
    yield place.run("fedtune.sim", f"resume={run}", "rounds=0")
    yield place.run("fedtune.sim", f"resume={run}")
    yield place.run("fedtune.sim", f"resume={run}", "rounds=2")


@follows("all {} rounds are done: to train further, set rounds=N with a larger N", slow=True)
def _(place: Place) -> Iterator[str]:
    run = one_round_run(place)
    notes: list[str] = []
    place.patch.setattr("fedtune.runs.observer.RunObserver.note", lambda self, text: notes.append(text))
    place.run("fedtune.sim", f"resume={run}")
    yield "\n".join(notes)
    notes.clear()
    yield place.run("fedtune.sim", f"resume={run}", "rounds=2") or "".join(n for n in notes if "rounds are done: " in n)


@follows('fedtune generate {} "..."')
def _(place: Place) -> Iterator[str]:
    one_round_run(place)
    printed = (place.kept / "ended/printed").read_text()
    yield printed
    (line,) = re.findall(r"use it: (fedtune generate .*)\)", printed)
    yield place.run(*shlex.split(line))


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _error_with(place: Place, target: str, how: Any, *argv: str) -> str:
    """The error while something does not work, then "" when it works again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, how, raising=False)
        return place.run(*argv) if argv else simulate(place)


@follows("stopped; continue with resume={}", slow=True)
def _(place: Place) -> Iterator[str]:
    message = _error_with(place, "fedtune.rounds.bridge.Bridge.loop", _interrupt)
    yield message
    yield place.run("fedtune.sim", setting_of(message))


@follows("{}: free disk space and continue with resume={}", slow=True)
def _(place: Place) -> Iterator[str]:
    message = _error_with(place, "fedtune.experiment.write_card", _full)
    yield message
    yield place.run("fedtune.sim", setting_of(message))


@follows("cannot write the checkpoint {}: {}; free disk space and continue with resume={}", slow=True)
def _(place: Place) -> Iterator[str]:
    message = _error_with(place, "fedtune.runs.directory.save_file", _full)
    yield message
    yield place.run("fedtune.sim", setting_of(message))


@follows("cannot write {}: {}; make the run's folder writable", slow=True)
def _(place: Place) -> Iterator[str]:
    run = one_round_run(place)
    yield _error_with(place, "fedtune.runs.directory.write_text", _full, "fedtune.sim", f"resume={run}")
    yield place.run("fedtune.sim", f"resume={run}")


@follows("cannot open the run {}: {}; make the run's folder writable", slow=True)
def _(place: Place) -> Iterator[str]:
    run = one_round_run(place)
    yield _error_with(place, "fedtune.runs.directory.open", _full, "fedtune.sim", f"resume={run}")
    yield place.run("fedtune.sim", f"resume={run}")


@follows("run {} is in use by another process: wait for it or stop it first", slow=True)
def _(place: Place) -> Iterator[str]:
    run = one_round_run(place)
    with open(run / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield place.run("fedtune.sim", f"resume={run}")
    yield place.run("fedtune.sim", f"resume={run}")


def stop_server(place: Place, at: Path) -> str:
    """A server that makes its run's directory and stops."""
    quiet_server(place)
    place.patch.setattr("fedtune.experiment.run_experiment", lambda config, engine, at, **more: RunDirectory.create(config, at).close())
    return place.run("fedtune-server", "--insecure", "--run", at)


@follows("cannot create the run directory {}: {}; free disk space, or set output_dir")
def _(place: Place) -> Iterator[str]:
    place.patch.setattr("fedtune.experiment.simulate", lambda config: RunDirectory.create(config).close())
    yield place.run("fedtune.sim", "output_dir=/proc/no")
    yield place.run("fedtune.sim", f"output_dir={place.folder}")
    assert "(of a server: --run)" in stop_server(place, Path("/proc/no"))
    yield stop_server(place, place.folder / "run")


@follows("but no run (no config.yaml): give an empty folder or a new one")
def _(place: Place) -> Iterator[str]:
    for name in ("full", "empty"):
        (place.folder / name).mkdir()
    (place.folder / "full/letter.txt").write_text("dear")
    for name in ("full", "empty", "new"):
        yield stop_server(place, place.folder / name)


@follows("there is a run in {} already: continue it with resume={}, or give another folder", slow=True)
def _(place: Place) -> Iterator[str]:
    run = one_round_run(place)
    config = from_dict(yaml.safe_load((run / "config.yaml").read_text()))
    message = error_of(lambda: RunDirectory.create(config, run))  # a command gets this error only if two start at once
    yield message
    yield place.run("fedtune.sim", setting_of(message))
    yield error_of(lambda: RunDirectory.create(config, place.folder / "another").close())


@follows("{} already exists: give a new run its own directory, or continue this one with resume={}", slow=True)
def _(place: Place) -> Iterator[str]:
    run = one_round_run(place)
    message = error_of(lambda: MetricsWriter(run, None))  # other checks of a run directory come before this one
    yield message
    yield place.run("fedtune.sim", setting_of(message))
    yield error_of(lambda: MetricsWriter(place.folder, None).close())


def _page(run: Path) -> str:
    return error_of(lambda: write_report(run))


@follows("{} cannot be read ({}): restore it or move it away")
def _(place: Place) -> Iterator[str]:
    run = make_run(place.folder / "run")
    (run / "partition.json").write_text("{")
    yield _page(run)
    (run / "partition.json").rename(place.folder / "away")
    yield _page(run)


@follows("{} should hold a {}, not a {}: restore it or move it away")
def _(place: Place) -> Iterator[str]:
    run = make_run(place.folder / "run")
    (run / "answers.json").write_text("{}")
    yield _page(run)
    (run / "answers.json").rename(place.folder / "away")
    yield _page(run)


@follows("fedtune: job {} has already finished, in {}: delete that folder to run it again", slow=True)
def _(place: Place) -> Iterator[str]:
    assert not simulate(place, "seed=3")
    argv = ["fedtune.sim", scenario(place), f"output_dir={place.folder}", "seed=3,4", "-m"]
    place.run(*argv)
    output = " ".join(place.printed.split())
    yield output
    (path,) = re.findall(r"finished, in (\S+): delete", output)
    shutil.rmtree(path)
    yield place.run(*argv) or "".join(line for line in place.printed.splitlines() if path in line)


@follows("unknown flag {}: see --help")
def _(place: Place) -> Iterator[str]:
    output = place.run("fedtune.sim", "--run")
    yield output
    yield place.run("fedtune.sim", output.split()[-1])


def _unusable(*_: Any, **__: Any) -> None:
    raise UpdateError("unusable")


@follows("the run ended in its {} stage, before it had a {} adapter: continue with resume={} rounds=N", slow=True)
def _(place: Place) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedtune.rounds.round.read_update", _unusable)
        output = simulate(place, "strategy=slora", "rounds=1")
    yield output
    yield place.run("fedtune.sim", setting_of(output), setting_of(output, "rounds").replace("N", "4"))
