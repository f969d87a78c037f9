"""Saves the import time of child processes: if FEDTUNE_FAULTS_FORK is set, a process is forked instead of started as `python -m MODULE`.

For slow machines. Pids, parents, pipes, signals and sessions are as with real starts.

    python -m tests.faults.forking TEST FOLDER      runs a test of `in_own_process` in this way
"""

import functools
import gc
import inspect
import logging
import os
import runpy
import signal
import subprocess
import sys
import traceback
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FORK = "FEDTUNE_FAULTS_FORK"
_parents: list[Any] = []


class Forked(subprocess.Popen):
    """A Popen that forks this process and runs the module of the command `PYTHON … -m MODULE …` there."""

    def _execute_child(self, args: Any, *rest: Any) -> None:  # type: ignore[override]
        (_, _, _, _, _, env, _, _, _, stdin, to_stdin, of_stdout, stdout, of_stderr, stderr, *more) = rest
        start_new_session, process_group = more[-2:]
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                if start_new_session:
                    os.setsid()
                if process_group == 0:
                    os.setpgid(0, 0)
                code = _become(list(args), env, (stdin, stdout, stderr))
            except BaseException:
                traceback.print_exc()
            finally:
                for stream in (sys.stdout, sys.stderr):
                    stream.flush()
                os._exit(code)
        self._child_created = True
        self._close_pipe_fds(stdin, to_stdin, of_stdout, stdout, of_stderr, stderr)  # type: ignore[attr-defined]


def _become(command: list[str], env: dict[str, str] | None, streams: tuple[int, int, int]) -> int:
    gc.disable()  # finalizers of the parent's objects would close descriptors whose numbers are reused here
    for here, given in enumerate(streams):
        if given >= 0:
            os.dup2(given, here)
    os.closerange(3, 4096)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for name in (None, *logging.root.manager.loggerDict):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    if env is not None:
        os.environ.clear()
        os.environ.update(env)
    _parents.extend((sys.stdin, sys.stdout, sys.stderr))  # whose finalizers would close the descriptors
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
    module = command.index("-m") + 1
    sys.argv = command[module:]
    name_process(os.environ.get("FEDTUNE_DEPLOYMENT", ""))
    gc.enable()
    gc.freeze()
    warnings.simplefilter("ignore", RuntimeWarning)  # runpy's, about a module that is imported already
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def name_of(folder: str) -> str:
    """Process name of a deployment; the environment cannot identify a forked process, because /proc shows its parent's."""
    import hashlib

    return "ft" + hashlib.sha256(folder.encode()).hexdigest()[:10]


def name_process(folder: str) -> None:
    import ctypes

    ctypes.CDLL(None).prctl(15, name_of(folder).encode())


def preload() -> None:
    """Import all modules that server and client import at some time."""
    from peft import LoraConfig  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, LlamaTokenizerFast  # noqa: F401

    import fedtune.cli.client
    import fedtune.cli.server
    import fedtune.clients.deployed
    import fedtune.experiment
    import fedtune.network.node
    import fedtune.network.status_server
    import fedtune.network.superlink
    import fedtune.network.worker
    import fedtune.strategies.fedavg  # noqa: F401
    from fedtune.network import executor, link

    fork_from(executor, link)


def popen() -> type[subprocess.Popen]:
    return Forked if os.environ.get(FORK) else subprocess.Popen


def fork_from(*modules: types.ModuleType) -> None:
    """Make `subprocess.Popen` of these modules fork."""
    for module in modules:
        module.subprocess = types.SimpleNamespace(**{**vars(subprocess), "Popen": Forked})  # type: ignore[attr-defined]


def in_own_process(test: Callable[[Path], None]) -> Callable[[Path], None]:
    """Run a test in a separate process, which has imported all modules and forks every process that the test starts."""

    @functools.wraps(test)
    def run(tmp_path: Path) -> None:
        if os.environ.get(FORK):
            return test(tmp_path)
        command = [sys.executable, "-m", "tests.faults.forking", f"{inspect.getfile(test)}::{test.__name__}", str(tmp_path / "alone")]
        done = subprocess.run(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-10000:]

    return run


if __name__ == "__main__":
    os.environ[FORK] = "1"
    preload()
    sys.exit(pytest.main([sys.argv[1], f"--basetemp={sys.argv[2]}", "-m", "slow", "-q"]))
