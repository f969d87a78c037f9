"""Rows of advice: each row causes an error, then follows the advice of the error."""

import copy
import functools
import importlib
import re
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedtune.cli import client, server
from fedtune.cli import main as cli
from fedtune.cli import simulate as sim
from fedtune.config.compose import SweepJob, compose

FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
_PROSE = {"or", "to", "of", "makes", "does", "without", "where"}
_CHOICES = re.compile(r"(?: [a-z][a-z0-9_-]*(?:,? or [a-z][a-z0-9_-]*)*)?")


@dataclass
class Place:
    """The folders and fixtures of one row's test.

    Args:
        folder: An empty folder.
        patch: Pytest's monkeypatch; undoes its changes after the row.
        output: Captures what the process prints.
        kept: Folder for files that several rows use; see `keep`.
    """

    folder: Path
    patch: pytest.MonkeyPatch
    output: pytest.CaptureFixture[str]
    kept: Path

    def keep(self, name: str, make: Callable[[Path], Any]) -> Path:
        """A file or folder that `make(path)` creates once; rows that change it work on a copy."""
        path = self.kept / name
        if not path.exists():
            make(path)
        return path

    def run(self, *argv: str | Path) -> str:
        """The error of a command with these arguments; "" if it succeeds."""
        name, *rest = map(str, argv)
        program = {"fedtune": cli.main, "fedtune-server": server.main, "fedtune-client": client.main, "fedtune.sim": sim.main}[name]
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        self.output.readouterr()
        try:
            code = program(rest)
        except SystemExit as end:  # raised by argparse
            code = int(str(end.code or 0))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        out, err = self.output.readouterr()
        self.printed, self.warned = out, err
        assert (code == 0) or err, f"{argv} exits with {code} and prints no error"
        return err if code else ""


@functools.cache
def _compose_once(settings: tuple[str, ...]) -> list[SweepJob]:
    return compose(list(settings))


def compose_once(settings: Sequence[str]) -> list[SweepJob]:
    """`compose`, which takes half a second, once for the same settings."""
    return copy.deepcopy(_compose_once(tuple(settings)))


Follow = Callable[[Place], Iterator[str]]


@dataclass(frozen=True)
class Row:
    """One sentence of advice, and the test that follows it.

    Args:
        says: Part of the sentence as in the source, with {} for each value; no other sentence contains it.
        follow: Yields the error, then for each way of following its advice the next error, "" if there is none.
        slow: Whether it takes more than a few tenths of a second.
        library: A library that must be installed for it.
    """

    says: str
    follow: Follow
    slow: bool = False
    library: str = ""


ROWS: list[Row] = []


def follows(says: str, *, slow: bool = False, library: str = "") -> Callable[[Follow], Follow]:
    """Add a function to the table; see `Row`."""

    def enter(follow: Follow) -> Follow:
        ROWS.append(Row(says, follow, slow, library))
        return follow

    return enter


def command(says: str, line: str, *, ready: Callable[[Place], Any] | None = None, slow: bool = False, **values: str) -> None:
    """Add a command line whose error names flags to add, change or leave out.

    Args:
        says: As in `Row`.
        line: The command. {NAME} is the path that the mapping from `ready` has for NAME; {here} is the empty folder. Its out/ is removed
            before each attempt.
        ready: Prepares what the command needs; may return a mapping from names to paths.
        values: Flag → value, for flags that the sentence names without one: `out="{here}/another"`.
    """

    def follow(place: Place) -> Iterator[str]:
        names = {"here": str(place.folder), **((ready(place) or {}) if ready else {})}
        given = {f"--{name.replace('_', '-')}": value.format(**names) for name, value in values.items()}
        argv = shlex.split(line.format(**names))
        output = place.run(*argv)
        yield output
        all_ways = ways(output, argv, given)
        assert all_ways, f"nothing to follow in: {output}"
        for way in all_ways:
            yield _insist(place, way, given, output)

    ROWS.append(Row(says, follow, slow))


def _insist(place: Place, argv: list[str], given: Mapping[str, str], first: str, more: int = 3) -> str:
    """Run the command, and follow the advice of any other errors too. Returns the last error; "" if there is none."""
    shutil.rmtree(place.folder / "out", ignore_errors=True)  # remove the output of the previous way
    output = place.run(*argv)
    if output and output != first and more:
        for way in ways(output, argv, given):
            if not _insist(place, way, given, first, more - 1):
                return ""
    return output


def ways(error: str, argv: list[str], given: Mapping[str, str]) -> list[list[str]]:
    """The command lines that an error advises.

    `leave out --a and --b, or --c` gives two command lines, and so does `use --to edge or hf`. A flag without a value gets that of `given`.
    """
    if clash := re.search(r"argument (--\S+): not allowed with argument (--\S+)", error):
        return [_without(argv, clash[2])]
    error = re.sub(r" \([^()]*\)", "", error)  # reasons in parentheses
    advice = max(error.rpartition(": ")[2], error.rpartition("; ")[2], key=lambda part: bool(FLAG.search(part) or "leave" in part))
    advice = error.split(": ", 2)[-1] if not FLAG.search(advice) and "leave" not in advice else advice
    advice = advice.rpartition(" needs ")[2]
    results: list[list[str]] = []
    for words in re.findall(r"leave out ((?:--[a-z-]+(?:, or | and )?)+)", advice):
        results += [_without(argv, *FLAG.findall(part)) for part in words.split(", or ")]
        advice = advice.replace(words, "")
    if re.search(r"leave (?:it|one) out", advice):
        results += [_without(argv, flag) for flag in FLAG.findall(error)[: 2 if "leave one out" in advice else 1]]
    for match in FLAG.finditer(advice):
        flag, choices = match.group(), _CHOICES.match(advice, match.end())
        words = re.findall(r"[a-z][a-z0-9_-]*", choices.group() if choices else "")
        kept = [word for word in words if word not in _PROSE]
        values = kept if kept and flag not in given else [given[flag]] if flag in given else []
        assert values, f"the row gives no value for {flag}: {error}"
        results += [[*_without(argv, flag), flag, *shlex.split(value)] for value in values]
    return results


def _without(argv: list[str], *flags: str) -> list[str]:
    kept, skips = [], False
    for word in argv:
        skips = word in flags or (skips and not word.startswith("--"))
        kept += [] if skips else [word]
    return kept


def error_of(call: Callable[[], Any]) -> str:
    """The error of a call, "" if there is none; for code that no command reaches."""
    from fedtune.errors import FedtuneError

    try:
        call()
    except FedtuneError as bad:
        return str(bad)
    return ""


def load_tables() -> list[Row]:
    """All rows, from the modules of this folder."""
    for file in sorted(Path(__file__).parent.glob("*.py")):
        if file.stem not in ("__init__", "rows"):
            importlib.import_module(f"tests.advised.{file.stem}")
    return ROWS
