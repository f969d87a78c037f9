"""Compiling the kernels."""

import ctypes
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fedtune.inference.engine.native import build
from fedtune.inference.engine.native.library import SETS

NATIVE = build.FOLDER
ROOT = Path(__file__).parents[4]
gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")


def test_a_system_without_a_compiler_or_threads_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda _: None)
    assert build.compiler() is None and build.main() == 2
    assert capsys.readouterr().err == "the native kernels are not built: there is no C compiler, and no package ziglang\n"
    monkeypatch.setattr(build.platform, "system", lambda: "Windows")
    assert build.main() == 2 and "Windows is not supported" in capsys.readouterr().err


def test_a_compiler_that_fails_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "#!/bin/sh\nwhile [ $1 != -o ]; do shift; done\necho part > $2\necho 'x.c:1: error: no header' >&2\nexit 1\n"
    (tmp_path / "cc").write_text(script)
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/kernels.so").write_text("of before")
    with pytest.raises(build.BuildError, match="failed: x.c:1: error: no header"):
        build.build(tmp_path / "out/kernels.so")
    assert not list((tmp_path / "out").iterdir())


def test_zig_compiles_for_any_cpu_of_the_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: name == "ziglang" or None)
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    zig = [sys.executable, "-m", "ziglang", "cc", "-target"]
    assert build.compiler() == build.compiler("x86_64") == [*zig, "x86_64-linux-gnu.2.17", "-mcpu=x86_64"]
    assert build.compiler("aarch64") == [*zig, "aarch64-linux-gnu.2.17", "-mcpu=generic"]
    with pytest.raises(build.BuildError, match="^riscv64 is not supported$"):
        build.build(machine="riscv64")
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(build.BuildError, match="^aarch64 needs the package ziglang$"):
        build.build(machine="aarch64")


MACHINES = {"x86_64": 62, "aarch64": 183}  # e_machine of an ELF file


@pytest.mark.slow
def test_one_command_builds_the_wheels_of_both_architectures_without_a_c_compiler(tmp_path: Path) -> None:
    for needed in ("hatchling", "build", "ziglang"):
        pytest.importorskip(needed)
    kept = build.LIBRARY.read_bytes() if build.LIBRARY.is_file() else None
    command = [sys.executable, str(ROOT / "packaging/wheels.py"), str(tmp_path), "--no-isolation"]
    made = subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ | {"PATH": "/none", "CC": ""})
    assert made.returncode == 0, made.stdout + made.stderr
    assert {w.name.split("-", 2)[2] for w in tmp_path.iterdir()} == {f"py3-none-manylinux_2_17_{machine}.whl" for machine in MACHINES}
    for machine, number in MACHINES.items():
        wheel = zipfile.ZipFile(next(tmp_path.glob(f"*_{machine}.whl")))
        assert sum(name.endswith(".so") for name in wheel.namelist()) == 1
        library = wheel.read("fedtune/inference/engine/native/kernels.so")
        assert library[:6] == b"\x7fELF\x02\x01" and int.from_bytes(library[18:20], "little") == number
        assert build.digest().encode() in library
        versions = {tuple(map(int, found.split(b"."))) for found in re.findall(rb"GLIBC_([\d.]+)", library)}
        assert versions and max(versions) <= (2, 17)
        assert "Root-Is-Purelib: false" in wheel.read(next(n for n in wheel.namelist() if n.endswith("/WHEEL"))).decode()
    assert kept == (build.LIBRARY.read_bytes() if build.LIBRARY.is_file() else None)  # the checkout's own kernels stay


@pytest.mark.slow
@gcc
def test_the_library_carries_the_digest_of_its_sources(tmp_path: Path) -> None:
    build.build(tmp_path / "kernels.so", ["-Werror", "-Wpedantic"])
    library = ctypes.CDLL(str(tmp_path / "kernels.so"))
    library.fedtune_sources.restype = ctypes.c_char_p
    assert library.fedtune_sources().decode() == build.digest() and library.fedtune_supports(0) and not library.fedtune_supports(len(SETS))


@pytest.mark.slow
@gcc
@pytest.mark.parametrize("which", ["address,undefined", "thread"])
@pytest.mark.parametrize(("driver", "least"), [("driver.c", 4 * 8 * 8), ("driver_pass.c", 4 * 7 * 6)])
def test_sanitizers_find_nothing(driver: str, least: int, which: str, tmp_path: Path) -> None:
    flags = ["-std=c11", "-O1", "-g", "-ffp-contract=off", "-pthread", "-march=x86-64", f"-fsanitize={which}", "-fno-sanitize-recover=all"]
    command = [
        "gcc",
        *flags,
        f"-I{NATIVE}",
        str(Path(__file__).with_name(driver)),
        *map(str, build.sources()),
        "-o",
        str(tmp_path / "driver"),
        "-lm",
    ]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode and "cannot find" in made.stderr:
        pytest.skip("gcc has no such sanitizer here")
    assert made.returncode == 0, made.stderr
    every = 5 if driver == "driver_pass.c" else 1  # 40 s instead of 250: each width with each cache, but not with each kind and set
    ran = subprocess.run([str(tmp_path / "driver"), str(every)], capture_output=True, text=True, timeout=1200)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert int(ran.stdout) >= least // every  # kinds, sizes and numbers of rows or caches, with the portable kernels at least


HOOK = """
import json, sys
from hatchling.builders.wheel import WheelBuilder
if sys.argv[3] == "none":
    sys.modules["ziglang"] = None  # as if it were not installed
builder = WheelBuilder(sys.argv[1])
print(json.dumps(builder.config.dynamic_dependencies))
print(next(builder.build(directory=sys.argv[2], versions=["standard"])))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("case", "asks", "native"), [("gcc", [], True), ("off", [], False), ("none", ["ziglang>=0.13"], False)])
def test_the_wheel_has_the_kernels_and_a_platform_or_neither(case: str, asks: list[str], native: bool, tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    if case == "gcc" and shutil.which("cc") is None or platform.system() != "Linux":
        pytest.skip("needs Linux, and a C compiler")
    tree = tmp_path / "tree"
    (tree / "fedtune").mkdir(parents=True)
    shutil.copytree(NATIVE, tree / "fedtune/inference/engine/native", ignore=shutil.ignore_patterns("kernels.so", "__pycache__"))
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, tree / name)
    environment = os.environ | ({"FEDTUNE_NATIVE": "off"} if case == "off" else {"PATH": "/none"} if case == "none" else {})
    environment = {name: value for name, value in environment.items() if name != "CC"}
    made = subprocess.run(
        [sys.executable, "-c", HOOK, str(tree), str(tmp_path), case], capture_output=True, text=True, env=environment, timeout=300
    )
    assert made.returncode == 0, made.stderr
    found, wheel = made.stdout.splitlines()[0], Path(made.stdout.splitlines()[-1])
    assert json.loads(found) == asks
    names = zipfile.ZipFile(wheel).namelist()
    assert ("fedtune/inference/engine/native/kernels.so" in names) == native and "fedtune/inference/engine/native/kernels.h" in names
    assert wheel.name.endswith(f"-py3-none-linux_{platform.machine()}.whl" if native else "-py3-none-any.whl")
    assert ("the engine needs torch then" in made.stdout + made.stderr) == (case == "none")
