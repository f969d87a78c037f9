"""Which instruction sets a CPU has, by its feature bits; and that no function holds an instruction of another set."""

import ctypes
import itertools
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

from fedtune.inference.engine.native import build, choice, library
from fedtune.inference.engine.native.library import SETS, why_not

needs_library = pytest.mark.skipif(isinstance(library._opened(), str), reason=f"run `{build.COMMAND}`: {why_not()}")
BITS = {  # Linux's name: register and bit, from Intel's manual (CPUID)
    "fma": ("c1", 12), "osxsave": ("c1", 27), "avx": ("c1", 28),
    "avx2": ("b7", 5), "avx512f": ("b7", 16), "avx512dq": ("b7", 17), "avx512bw": ("b7", 30), "avx512vl": ("b7", 31),
    "avx512_vnni": ("c7", 11), "avx_vnni": ("a71", 4), "avx512_bf16": ("a71", 5),
}  # fmt: skip
YMM, ZMM = 0b111, 0b11100111  # the registers that the system saves
V3 = {"fma", "osxsave", "avx", "avx2"}
V4 = V3 | {"avx512f", "avx512dq", "avx512bw", "avx512vl"}
NEEDS = {"avx2": V3, "avxvnni": V3 | {"avx_vnni"}, "avx512": V4 | {"avx512_vnni"}, "avx512 bf16": V4 | {"avx512_vnni", "avx512_bf16"}}


def names(bits: int) -> set[str]:
    return {name for at, name in enumerate((*SETS, "avx512 bf16")) if bits >> at & 1}


def x86(features: Iterable[str], saved: int) -> set[str]:
    registers = {"c1": 0, "b7": 0, "c7": 0, "a71": 0}
    for feature in features:
        register, bit = BITS[feature]
        registers[register] |= 1 << bit
    return names(library._opened().fedtune_sets_of_x86(*map(ctypes.c_uint32, registers.values()), ctypes.c_uint64(saved)))


@needs_library
@pytest.mark.parametrize(
    ("features", "saved", "sets"),
    [
        (set(), 0, set()),  # Nehalem
        ({"osxsave", "avx"}, YMM, set()),  # Sandy Bridge
        (V3, YMM, {"avx2"}),  # Haswell
        (V3 | {"avx512f"}, ZMM, {"avx2"}),  # Knights Landing
        (V4, ZMM, {"avx2"}),  # Skylake-X: no VNNI
        (V4 | {"avx512_vnni"}, ZMM, {"avx2", "avx512"}),  # Cascade Lake
        (V4 | {"avx512_vnni", "avx512_bf16"}, ZMM, {"avx2", "avx512", "avx512 bf16"}),  # Cooper Lake
        (V3 | {"avx_vnni"}, YMM, {"avx2", "avxvnni"}),  # Alder Lake
        (set(BITS), ZMM, {"avx2", "avxvnni", "avx512", "avx512 bf16"}),  # Sapphire Rapids
        (set(BITS), YMM, {"avx2", "avxvnni"}),  # the same CPU under a system that does not save wide registers
        (set(BITS), 0b11, set()),
        (set(BITS) - {"osxsave"}, 0, set()),
    ],
)
def test_a_cpu_gets_the_sets_that_it_has(features: set[str], saved: int, sets: set[str]) -> None:
    assert x86(features, saved) == {"portable"} | sets


@needs_library
def test_a_set_needs_all_of_its_features_and_no_other() -> None:
    for saved, possible in ((0, set()), (0b11, set()), (YMM, {"avx2", "avxvnni"}), (ZMM, set(NEEDS))):
        for chosen in itertools.product((False, True), repeat=len(BITS)):
            features = set(itertools.compress(BITS, chosen))
            assert x86(features, saved) == {"portable"} | {name for name in possible if NEEDS[name] <= features}, (features, saved)


@needs_library
def test_an_arm_cpu_needs_the_dot_product_for_both_of_its_sets() -> None:
    dot, products = 1 << 20, 1 << 13  # HWCAP_ASIMDDP, HWCAP2_I8MM
    every = (1 << 64) - 1
    found = [
        names(library._opened().fedtune_sets_of_arm(*map(ctypes.c_uint64, caps)))
        for caps in ((0, 0), (dot, 0), (0, products), (dot, products), (every ^ dot, every), (every, every ^ products))
    ]
    neither, dots, both = {"portable"}, {"portable", "dotprod"}, {"portable", "dotprod", "i8mm"}
    assert found == [neither, dots, neither, both, neither, dots]


@needs_library
@pytest.mark.skipif(not choice.cpu_features(), reason="the CPU's flags are read from /proc")
def test_this_cpu_gets_the_sets_of_its_flags() -> None:
    flags = choice.cpu_features() | {"osxsave"}
    wanted = {"portable"} | {name for name, needs in NEEDS.items() if needs <= flags}
    if "asimddp" in flags:
        wanted |= {"dotprod", "i8mm"} if "i8mm" in flags else {"dotprod"}
    assert {name for at, name in enumerate(SETS) if library._opened().fedtune_supports(at)} == wanted - {"avx512 bf16"}


BASE = "generic64"  # x86-64 without any extension
AVX2 = f"{BASE}+avx2+fma"
AVX512 = f"{AVX2}+avx512f+avx512bw+avx512dq+avx512vl+avx512_vnni"
ALLOWED = {  # machine → (patterns of file and function, allowed extensions); the first match counts
    "x86_64": [
        (r"avx2:.*vnni.*", f"{AVX2}+avx_vnni"), (r"avx2:.*", AVX2), (r"avx512:bf16_tile.*", f"{AVX512}+avx512_bf16"),
        (r"avx512:.*", AVX512), (r"cpu:fedtune_kernels_of", f"{BASE}+xsave"), (r".*", BASE),
    ],
    "aarch64": [(r"neon:.*i8mm", "generic+dotprod+i8mm"), (r"neon:.*", "generic+dotprod"), (r".*", "generic")],
}  # fmt: skip
JUMP = re.compile(r"(bnd |notrack )?(j[a-z]+|call|loop[a-z]*) +[0-9a-f]+ ")  # jumps to an address, which do not assemble alone


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(machine: str, compiler: list[str], source: Path, folder: Path) -> dict[str, set[str]]:
    """Function -> its instructions as text: x86-64's by objdump, aarch64's by the compiler."""
    file, found, name = folder / source.stem, dict[str, set[str]](), ""
    output_of(*compiler, *build.FLAGS, "-c" if machine == "x86_64" else "-S", str(source), "-o", str(file))
    text = output_of("objdump", "-d", "-w", "--no-show-raw-insn", str(file)) if machine == "x86_64" else file.read_text()
    for line in text.splitlines():
        if named := re.match(r"[0-9a-f]+ <(.+)>:$|(\w+):", line):
            name = named[1] or named[2]
        one = re.match(r"(?: +[0-9a-f]+:)?\t([{a-z].*?)(//.*)?$", line)
        if one and not JUMP.match(one[1]) and not one[1].startswith("data16"):  # padding
            found.setdefault(name, set()).add(re.sub(r"\.L[\w.]+", "label", one[1]).strip())
    return found


def assembler_errors(machine: str, several: set[str], allowed: str, folder: Path) -> list[str]:
    """The assembler's errors about instructions that are not allowed."""
    file, out = folder / "one.s", str(folder / "one.o")
    file.write_text("".join(f"{text}\n" for text in sorted(several)))
    zig = [*(build.compiler(machine) or [])[:-1], f"-mcpu={allowed}", "-c"]
    command = ["as", f"-march={allowed}"] if machine == "x86_64" else zig
    done = subprocess.run([*command, str(file), "-o", out], capture_output=True, text=True)
    return [line for line in done.stderr.splitlines() if "error" in line.lower()] if done.returncode else []


def find_violations(machine: str, compiler: list[str], folder: Path) -> dict[str, list[str]]:
    """File and allowed extensions → the assembler's errors."""
    together = dict[tuple[str, str], set[str]]()
    for source in build.sources():
        for function, several in instructions(machine, compiler, source, folder).items():
            allowed = next(allowed for pattern, allowed in ALLOWED[machine] if re.fullmatch(pattern, f"{source.stem}:{function}"))
            together.setdefault((source.stem, allowed), set()).update(several)
    assert {allowed for _, allowed in together} == {allowed for _, allowed in ALLOWED[machine]}  # each pattern matches a function
    found = {f"{file} {allowed}": assembler_errors(machine, several, allowed, folder) for (file, allowed), several in together.items()}
    return {place: bad for place, bad in found.items() if bad}


@pytest.mark.slow
@pytest.mark.parametrize("which", ["here", *ALLOWED])
def test_a_function_has_no_instruction_of_another_set(which: str, tmp_path: Path) -> None:
    machine = "x86_64" if which == "here" else which
    if machine == "x86_64" and (platform.machine() != machine or not (shutil.which("objdump") and shutil.which("as"))):
        pytest.skip("needs x86-64 and binutils")
    compiler = build.compiler("" if which == "here" else machine)
    if compiler is None:
        pytest.skip("needs a C compiler" if which == "here" else "needs the package ziglang")
    assert find_violations(machine, compiler, tmp_path) == {}
    # the check finds the instructions of a compiler that targets more than the baseline CPU
    more = [*compiler, "-mavx"] if machine == "x86_64" else [*compiler[:-1], "-mcpu=neoverse_v1"]
    found = {place.split()[0] for place in find_violations(machine, more, tmp_path)}
    assert found >= ({"pass", "portable", "product"} if machine == "x86_64" else {"pool", "portable"})
