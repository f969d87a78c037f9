"""Compiling the kernels."""

import ctypes
import json
import os
import platform
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
    command = build.compiler()
    assert command == [sys.executable, "-m", "ziglang", "cc", "-target", "x86_64-linux-gnu.2.17", "-mcpu=x86_64"]


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
    ran = subprocess.run([str(tmp_path / "driver")], capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert int(ran.stdout) >= least  # kinds, sizes and numbers of rows or caches, with the portable kernels at least


HOOK = """
import json, sys
from hatchling.builders.wheel import WheelBuilder
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
        [sys.executable, "-c", HOOK, str(tree), str(tmp_path)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert made.returncode == 0, made.stderr
    found, wheel = made.stdout.splitlines()[0], Path(made.stdout.splitlines()[-1])
    assert json.loads(found) == asks
    names = zipfile.ZipFile(wheel).namelist()
    assert ("fedtune/inference/engine/native/kernels.so" in names) == native and "fedtune/inference/engine/native/kernels.h" in names
    assert wheel.name.endswith(f"-py3-none-linux_{platform.machine()}.whl" if native else "-py3-none-any.whl")
    assert ("the engine needs torch then" in made.stdout + made.stderr) == (case == "none")
