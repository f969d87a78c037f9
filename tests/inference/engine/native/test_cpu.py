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
        (set(BITS), YMM, {"avx2", "avxvnni"}),  # the same where the system saves no wide registers
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
ALLOWED = [  # by file and function, the first that matches
    (r"avx2:.*vnni.*", f"{AVX2}+avx_vnni"), (r"avx2:.*", AVX2), (r"avx512:bf16_tile.*", f"{AVX512}+avx512_bf16"), (r"avx512:.*", AVX512),
    (r"cpu:fedtune_kernels_of", f"{BASE}+xsave"), (r".*", BASE),
]  # fmt: skip
JUMP = re.compile(r"(bnd |notrack )?(j[a-z]+|call|loop[a-z]*) +[0-9a-f]+ ")


def instructions(compiler: list[str], source: Path, folder: Path, *flags: str) -> dict[str, set[str]]:
    """Function -> its instructions as text, without direct jumps, whose targets are numbers."""
    file = folder / f"{source.stem}.o"
    subprocess.run([*compiler, *build.FLAGS, *flags, "-c", str(source), "-o", str(file)], check=True)
    shown = subprocess.run(["objdump", "-d", "-w", "--no-show-raw-insn", str(file)], capture_output=True, text=True, check=True).stdout
    found, name = dict[str, set[str]](), ""
    for line in shown.splitlines():
        if named := re.fullmatch(r"[0-9a-f]+ <(.+)>:", line):
            name = named[1]
        elif re.match(r" +[0-9a-f]+:\t", line):
            text = line.split("\t")[1]
            if not JUMP.match(text) and not text.startswith("data16"):  # padding
                found.setdefault(name, set()).add(text)
    return found


def refused(several: set[str], allowed: str, folder: Path) -> list[str]:
    """What the assembler says about instructions that are not in the allowed extensions."""
    file = folder / "one.s"
    file.write_text("".join(f"{text}\n" for text in sorted(several)))
    done = subprocess.run(["as", f"-march={allowed}", str(file), "-o", str(folder / "one.out")], capture_output=True, text=True)
    return [line for line in done.stderr.splitlines() if "Error" in line]


def of_other_sets(compiler: list[str], folder: Path, *flags: str) -> dict[str, list[str]]:
    """File and function -> what the assembler refuses."""
    found, together = dict[str, list[str]](), dict[tuple[str, str], set[str]]()
    for source in build.sources():
        for function, several in instructions(compiler, source, folder, *flags).items():
            place = f"{source.stem}:{function}"
            allowed = next(allowed for pattern, allowed in ALLOWED if re.fullmatch(pattern, place))
            together.setdefault((source.stem, allowed), set()).update(several)
    for (file, allowed), several in together.items():
        if bad := refused(several, allowed, folder):
            found[f"{file} {allowed}"] = bad
    assert {allowed for _, allowed in together} == {allowed for _, allowed in ALLOWED}  # each is held against something
    return found


binutils = pytest.mark.skipif(
    platform.machine() != "x86_64" or not (shutil.which("objdump") and shutil.which("as")), reason="needs x86-64 and binutils"
)


@pytest.mark.slow
@binutils
@pytest.mark.parametrize("which", ["here", "zig"])
def test_a_function_has_no_instruction_of_another_set(which: str, tmp_path: Path) -> None:
    compiler = build.compiler() if which == "here" else build.compiler("x86_64")
    if compiler is None:
        pytest.skip("needs a C compiler" if which == "here" else "needs the package ziglang")
    assert of_other_sets(compiler, tmp_path) == {}
    found = of_other_sets(compiler, tmp_path, "-mavx")  # what this test is for; api.c and pool.c compute nothing with floats
    assert {place.split()[0] for place in found} == {"pass", "portable", "product"}
