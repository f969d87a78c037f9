"""The kernels on emulated CPUs: aarch64's sets, and CPUs that lack a set. Zig compiles the drivers, QEMU's user mode runs them."""

import importlib.util
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fedtune.export.edge import export_edge
from fedtune.inference.engine.native import build
from fedtune.inference.engine.native.library import SETS
from fedtune.inference.engine.native.pack import PACKED, weights_of
from fedtune.models.checkpoint import NANO
from tests.inference.engine.native.test_kernels import Case, cases, kernels_of, product

QEMU = {m: shutil.which(f"qemu-{m}-static") or shutil.which(f"qemu-{m}") for m in build.ZIG_CPUS}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() not in build.ZIG_CPUS or not all(QEMU.values()), reason="needs QEMU (Debian's qemu-user-static)"),
    pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="needs the package ziglang"),
]
CPUS = {  # QEMU's names of CPUs → their instruction sets
    ("aarch64", "cortex-a72"): ("portable",),
    ("aarch64", "cortex-a76"): ("portable", "dotprod"),
    ("aarch64", "max"): ("portable", "dotprod", "i8mm"),
    ("x86_64", "Nehalem"): ("portable",),  # x86-64-v2
    ("x86_64", "Haswell"): ("portable", "avx2"),
}
LACKING = [
    ("aarch64", "cortex-a72", "dotprod"),
    ("aarch64", "cortex-a76", "i8mm"),
    ("x86_64", "Nehalem", "avx2"),
    ("x86_64", "Haswell", "avx512"),
]
NO_SUCH_SET = 13
UNDEFINED = ("-O1", "-fsanitize=undefined", "-fno-sanitize-recover=all")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulated")


def compile_driver(folder: Path, machine: str, driver: str, *flags: str) -> Path:
    out = folder / f"{driver}-{machine}"
    if not out.is_file():
        command = [part.replace(f"gnu.{build.GLIBC}", "musl") for part in build.compiler(machine) or ()]
        files = [str(Path(__file__).with_name(f"{driver}.c")), *map(str, build.sources())]
        whole = [*command, *build.FLAGS, "-static", *flags, f"-I{build.FOLDER}", *files, "-o", str(out), "-lm"]
        made = subprocess.run(whole, capture_output=True, text=True)
        assert made.returncode == 0, made.stderr[-2000:]
    return out


def run(machine: str, cpu: str, driver: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(QEMU[machine]), "-cpu", cpu, str(driver), *arguments], capture_output=True, text=True, timeout=900)


def write(file: Path, several: Iterable[Case]) -> None:
    """The file that driver_products.c reads."""
    with file.open("wb") as to:
        for at, case in enumerate(several):
            rows, n_in = case.x.shape
            w = weights_of(case.parts, case.kind, n_in, case.n_out)
            head = (w.kind, n_in, case.n_out, w.codes_bytes, w.scales_bytes, w.base_bytes, w.bias_bytes, rows, 1 + at % 3)
            to.write(np.array(head, np.int64).tobytes())
            for name in ("codes", "scales", "base", "bias"):
                to.write(case.parts[name].tobytes() if name in case.parts else b"")
            to.write(case.x.numpy().tobytes())


def outputs(file: Path, several: Iterable[Case]) -> Iterator[Tensor]:
    numbers, at = np.fromfile(file, np.float32), 0
    for case in several:
        size = len(case.x) * case.n_out
        yield torch.from_numpy(numbers[at : at + size]).view(len(case.x), case.n_out)
        at += size
    assert at == len(numbers)


def spoil(case: Case, bad: float) -> Case:
    x = case.x.clone()
    x[1, -1] = bad
    return Case(case.kind, case.parts, case.n_out, x)


@pytest.fixture(scope="module")
def products(folder: Path) -> dict[str, list[Case]]:
    """Cases of every kind, also written to a file for each kind. The last three have a row with a number that is not finite."""
    found = {}
    for kind in PACKED:
        found[kind] = list(cases(kind))
        found[kind] += [spoil(found[kind][-2], bad) for bad in (float("nan"), float("inf"), float("-inf"))]
        write(folder / kind, found[kind])
    return found


@pytest.fixture(scope="module")
def product_results(folder: Path, products: dict[str, list[Case]]) -> dict[tuple[str, str, str], bytes]:
    """The results of each CPU's last set: bytes by (machine, set, kind), and files. Asserts first which sets the CPU has."""
    results: dict[tuple[str, str, str], bytes] = {}
    for (machine, cpu), sets in CPUS.items():
        driver, name = compile_driver(folder, machine, "driver_products"), sets[-1]
        assert run(machine, cpu, driver).stdout.split() == [str(SETS.index(s)) for s in sets]
        for kind in PACKED:
            out = folder / f"{machine}-{name}-{kind}"
            ran = run(machine, cpu, driver, str(SETS.index(name)), str(folder / kind), str(out))
            assert ran.returncode == 0, (cpu, name, kind, ran)
            results[machine, name, kind] = out.read_bytes()
    return results


@pytest.mark.parametrize("kind", PACKED)
def test_products_of_every_set_equal_those_in_float64(
    kind: str, folder: Path, products: dict[str, list[Case]], product_results: dict[tuple[str, str, str], bytes]
) -> None:
    ran = [(machine, name) for machine, name, which in product_results if which == kind]
    assert set(ran) == {("aarch64", s) for s in ("portable", "dotprod", "i8mm")} | {("x86_64", s) for s in ("portable", "avx2")}
    for machine, name in ran:
        several = list(zip(products[kind], outputs(folder / f"{machine}-{name}-{kind}", products[kind]), strict=True))
        for case, y in several[:-3]:
            case.assert_close(y)
        clean = several[-5][1]
        for _, y in several[-3:]:
            assert torch.equal(y[0], clean[0]) and torch.equal(y[2:], clean[2:])
            assert not y[1].isfinite().any() if kind in ("bf16", "fp32") else y[1].isnan().all()


@pytest.mark.parametrize("kind", PACKED)
def test_sets_that_add_in_one_order_give_the_same_bits(
    kind: str, products: dict[str, list[Case]], product_results: dict[tuple[str, str, str], bytes]
) -> None:
    def same(one: tuple[str, str], other: tuple[str, str]) -> bool:
        a, b = (np.frombuffer(product_results[*which, kind], np.float32) for which in (one, other))
        return a.view(np.uint32)[~np.isnan(a)].tolist() == b.view(np.uint32)[~np.isnan(b)].tolist()  # NaN has more than one form

    assert same(("aarch64", "portable"), ("x86_64", "portable")) and same(("aarch64", "dotprod"), ("aarch64", "i8mm"))
    if kind != "fp32":  # fp32 sums have a vector's width, so their order differs
        assert same(("aarch64", "dotprod"), ("x86_64", "avx2"))


@pytest.mark.parametrize("instructions", ["avx2", "avxvnni", "avx512"])
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_this_cpu_gives_the_bits_of_aarch64(
    kind: str, instructions: str, folder: Path, products: dict[str, list[Case]], product_results: dict[tuple[str, str, str], bytes]
) -> None:
    here, several = kernels_of(instructions), products[kind]
    for case, y in list(zip(several, outputs(folder / f"aarch64-i8mm-{kind}", several), strict=True))[:-3]:
        assert torch.equal(product(here, case.parts, kind, case.x, case.n_out), y)


@pytest.mark.parametrize(("machine", "cpu", "lacks"), LACKING)
def test_a_set_that_the_cpu_lacks_is_refused_and_would_be_illegal(
    machine: str, cpu: str, lacks: str, folder: Path, products: dict[str, list[Case]]
) -> None:
    driver, out = compile_driver(folder, machine, "driver_products"), folder / "refused"
    arguments = (str(SETS.index(lacks)), str(folder / "int8"), str(out))
    assert run(machine, cpu, driver, *arguments).returncode == NO_SUCH_SET and not out.stat().st_size
    assert run(machine, cpu, driver, *arguments, "unasked").returncode == -signal.SIGILL
    if lacks != "avx512":  # QEMU 7 emulates AVX-512 on no CPU
        assert run(machine, "max", driver, *arguments, "unasked").returncode == 0


@pytest.mark.parametrize(("machine", "cpu", "flags"), [(*key, ()) for key in CPUS] + [("aarch64", "max", UNDEFINED)])
def test_passes_of_every_set_are_like_the_portable_ones(machine: str, cpu: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    ran = run(machine, cpu, compile_driver(tmp_path, machine, "driver_pass", *flags), "5")
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert int(ran.stdout) == len(CPUS[machine, cpu]) * 5 * 7 * 6 / 5  # sets, kinds, widths, caches; every fifth


PROGRAM = "import sys; from fedtune.cli.main import main; sys.exit(main())"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="this Python is for another CPU")
@pytest.mark.parametrize(("cpu", "has", "lacks"), [("Nehalem", "portable", "avx2"), ("Haswell", "avx2", "avx512")])
def test_the_program_runs_on_a_cpu_without_a_set_and_refuses_that_set(cpu: str, has: str, lacks: str, tmp_path: Path) -> None:
    export_edge(NANO, tmp_path / "edge", quantize="int4")
    emulator = (str(QEMU["x86_64"]), "-cpu", cpu)

    def answer(choice: str, *emulator: str) -> subprocess.CompletedProcess[str]:
        arguments = ("generate", str(tmp_path / "edge"), "turn on the light in the kitchen", "--max-new-tokens", "12")
        # numpy's OpenBLAS would run AVX on a Nehalem
        environment = os.environ | {"FEDTUNE_NATIVE": choice, "OPENBLAS_CORETYPE": "Prescott", "HOME": str(tmp_path)}
        command = [*emulator, sys.executable, "-c", PROGRAM, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)

    wanted, found, refused = answer("portable"), answer(has, *emulator), answer(lacks, *emulator)
    assert found.returncode == 0 and len(wanted.stdout) > 20 and found.stdout == wanted.stdout, found.stderr
    sentence = f"fedtune: FEDTUNE_NATIVE={lacks} needs a CPU with {lacks}, and this one has portable"
    assert refused.returncode == 2 and refused.stderr.splitlines()[-1].startswith(sentence), refused.stderr
