"""The choice of kernels, and their thread pool."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedtune.errors import ConfigError
from fedtune.inference.engine.linear import KINDS, Native, portable
from fedtune.inference.engine.make_linear import describe_path, linear_from_tensors
from fedtune.inference.engine.native import build, choice, library
from fedtune.inference.engine.native.choice import packing
from fedtune.inference.engine.native.library import SETS, kernels, why_not
from fedtune.inference.engine.reference.linears import Int4, apply

needs_library = pytest.mark.skipif(isinstance(library._opened(), str), reason=f"run `{build.COMMAND}`: {why_not()}")
ROOT = Path(__file__).parents[4]


@pytest.fixture(autouse=True)
def _clear_caches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("FEDTUNE_NATIVE", raising=False)
    remembered = library._chosen, library._opened
    for function in remembered:
        function.cache_clear()
    yield
    for function in remembered:
        function.cache_clear()


def normal(*size: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(size, np.float32)


def cpu(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    """A CPU with these flags."""
    monkeypatch.setattr(choice, "cpu_features", lambda: frozenset(flags))


def test_an_unknown_choice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTUNE_NATIVE", "sse9")
    with pytest.raises(
        ConfigError, match="FEDTUNE_NATIVE=sse9 is unknown: set it to off, portable, avx2, avxvnni, avx512, dotprod, i8mm, or leave it out"
    ):
        linear_from_tensors("int4", portable("int4", np.ones((1, 32), np.float32)), n_in=32)


@needs_library
def test_off_gives_torch_and_a_set_gives_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = portable("int8", normal(20, 40))
    found = {}
    for wanted in ("off", *(name for name in SETS if library._opened().fedtune_supports(SETS.index(name)))):
        monkeypatch.setenv("FEDTUNE_NATIVE", wanted)
        found[wanted] = describe_path([linear_from_tensors("int8", tensors, n_in=40)])
        assert packing() == ([] if wanted == "off" else ["int4 1", "int8 1", "bf16 1", "fp32 1"])
    assert found.pop("off") == "int8 by torch (FEDTUNE_NATIVE=off)"
    assert found == {name: f"int8 by native kernels ({name})" for name in found} and "portable" in found


@needs_library
def test_the_best_set_of_the_cpu_is_chosen_but_never_the_portable_one(monkeypatch: pytest.MonkeyPatch) -> None:
    real = library._opened()

    class Cpu:
        def __init__(self, *sets: str) -> None:
            self.fedtune_supports = lambda number: SETS[number] in sets

    arm = ("portable", "dotprod", "i8mm")
    for sets, chosen in ((SETS[:4], "avx512"), (SETS[:3], "avxvnni"), (SETS[:2], "avx2"), (arm, "i8mm"), (arm[:2], "dotprod")):
        monkeypatch.setattr(library, "_opened", lambda sets=sets: Cpu(*sets))
        library._chosen.cache_clear()
        run = kernels()
        assert run is not None and run.instructions == chosen
    monkeypatch.setattr(library, "_opened", lambda: Cpu("portable"))
    library._chosen.cache_clear()
    assert kernels() is None and why_not() == "this CPU has neither AVX2 nor NEON's dot product"
    with monkeypatch.context() as without:
        without.setattr(library, "has_torch", lambda: False)
        library._chosen.cache_clear()
        run = kernels()
        assert run is not None and run.instructions == "portable"
    library._chosen.cache_clear()
    monkeypatch.setenv("FEDTUNE_NATIVE", "avx2")
    with pytest.raises(ConfigError, match="FEDTUNE_NATIVE=avx2 needs a CPU with avx2, and this one has portable"):
        kernels()
    assert real.fedtune_supports(0)


@needs_library
def test_kinds_that_torch_runs_faster_stay_with_torch_unless_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu(monkeypatch, "amx_tile", "avx512_bf16")
    made = [linear_from_tensors(kind, portable(kind, normal(20, 40)), n_in=40) for kind in KINDS]
    assert describe_path(made[1:3]) == (
        "bf16 by torch (this CPU has AMX, which torch uses in bf16 and the native kernels do not), "
        "int8 by torch (this CPU has AMX, which torch uses in int8 and the native kernels do not)"
    )
    assert describe_path(made[::3]).startswith("fp32 by native kernels (") and ", int4 by native kernels (" in describe_path(made[::3])
    cpu(monkeypatch, "avx512f")
    assert packing() == ["int4 1", "int8 1", "fp32 1"]
    cpu(monkeypatch, "amx_tile")
    assert packing() == ["int4 1", "fp32 1"]
    with monkeypatch.context() as without:
        without.setattr(choice, "has_torch", lambda: False)  # without torch, the native kernels run every kind that they can
        assert packing() == ["int4 1", "int8 1", "bf16 1", "fp32 1"]
    monkeypatch.setenv("FEDTUNE_NATIVE", "portable")
    assert packing() == ["int4 1", "int8 1", "bf16 1", "fp32 1"]
    assert all(isinstance(linear_from_tensors(kind, portable(kind, normal(20, 40)), n_in=40), Native) for kind in KINDS)


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="the CPU's flags are read from /proc")
def test_the_cpus_flags_are_those_that_torch_finds() -> None:
    flags = choice.cpu_features()
    assert ("amx_tile" in flags) == torch.cpu._is_amx_tile_supported()
    assert ("avx512_bf16" in flags) == torch.cpu._is_avx512_bf16_supported()


@pytest.mark.parametrize("damage", ["missing", "no library", "other sources"])
def test_kernels_that_cannot_be_used_are_named_with_the_command(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if damage == "other sources":
        if not build.LIBRARY.is_file():
            pytest.skip("the kernels are not built")
        monkeypatch.setattr(build, "digest", lambda: "0" * 64)
    else:
        monkeypatch.setattr(build, "LIBRARY", tmp_path / "kernels.so")
    if damage == "no library":
        (tmp_path / "kernels.so").write_bytes(b"text")
    made = linear_from_tensors("int4", portable("int4", normal(3, 32)), n_in=32)
    assert isinstance(made, Int4) and apply(made, torch.randn(2, 32)).shape == (2, 3)  # torch's linear, which works
    found = {
        "missing": "they are not built",
        "no library": f"{tmp_path}/kernels.so is not for this system",
        "other sources": "other sources",
    }
    assert found[damage] in describe_path([made]) and build.COMMAND in describe_path([made])
    monkeypatch.setenv("FEDTUNE_NATIVE", "portable")
    with pytest.raises(ConfigError, match="FEDTUNE_NATIVE=portable needs the native kernels, but"):
        kernels()


# a process without torch, where the kernels have their own threads: a product of 64 blocks of 16 rows
PROCESS = """
import ctypes, os, sys, time
from fedtune.inference.engine.native.library import Weights, kernels
run, (n, k) = kernels(), (1024, 512)
codes, base = (ctypes.c_uint8 * (n * k))(*os.urandom(n * k)), (ctypes.c_float * n)(*[1.0] * n)
w = Weights(kind=2, n_in=k, n_out=n, codes=ctypes.addressof(codes), codes_bytes=n * k, base=ctypes.addressof(base), base_bytes=4 * n)
def product(threads, rows=2):
    x, y = (ctypes.c_float * (rows * k))(*map(float, range(rows * k))), (ctypes.c_float * (rows * n))()
    run.multiply(w, threads, rows, (ctypes.addressof(x), 4 * rows * k), (ctypes.addressof(y), 4 * rows * n))
    return bytes(y)
tasks = lambda: len(os.listdir("/proc/self/task"))
"""


def runs(script: str) -> list[str]:
    process = subprocess.run([sys.executable, "-c", PROCESS + script], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert process.returncode == 0, process.stderr
    return process.stdout.split()


@needs_library
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_the_threads_have_the_set_number_sleep_when_idle_and_survive_a_fork() -> None:
    script = """
want = product(1)
print(tasks())
assert product(3) == want and product(2) == want
print(tasks())
time.sleep(0.05)
before = time.process_time()
time.sleep(0.5)
print(round(time.process_time() - before, 1))
sys.stdout.flush()  # else the child prints it too
child = os.fork()
if not child:
    print(tasks(), product(2) == want, tasks(), flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(product(3) == want, tasks())
"""
    assert runs(script) == ["1", "3", "0.0", "1", "True", "2", "True", "3"]


@needs_library
def test_python_threads_may_multiply_at_once() -> None:
    torch.set_num_threads(2)
    x = normal(3, 320)
    made = [linear_from_tensors("int4", portable("int4", normal(700 + i, 320)), n_in=320) for i in range(4)]
    natives = [m for m in made if isinstance(m, Native)]
    wanted, wrong = [m(x) for m in natives], []
    assert len(natives) == 4

    def repeat(i: int) -> None:
        wrong.extend(i for _ in range(200) if not np.array_equal(natives[i](x), wanted[i]))

    several = [threading.Thread(target=repeat, args=(i,)) for i in range(4)]
    for thread in several:
        thread.start()
    for thread in several:
        thread.join(60)
    assert not wrong and not any(thread.is_alive() for thread in several)
