"""Compiles the kernels: `python -m fedtune.inference.engine.native.build`, and the build hook of a wheel or an editable install.

The compiler is `$CC`, else the system's, else Zig's (the package ziglang). The result runs on every CPU of the architecture, because the
kernels choose their instructions when they run. This module needs nothing but Python, since the hook loads it before fedtune is installed.
"""

import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
LIBRARY = FOLDER / "kernels.so"
COMMAND = "python -m fedtune.inference.engine.native.build"
SYSTEMS = ("Linux", "Darwin")  # the thread pool needs pthreads
GLIBC = "2.17"  # oldest version for kernels that Zig compiles, as in the wheel tag manylinux_2_17
ZIG_CPUS = {"x86_64": "x86_64", "aarch64": "generic"}  # architectures that Zig compiles for, each with its baseline CPU
FLAGS = ("-std=c11", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-pthread", "-Wall", "-Wextra")


class BuildError(RuntimeError):
    """The kernels cannot be compiled; the message ends a sentence."""


def sources() -> list[Path]:
    """The C files."""
    return sorted(FOLDER.glob("*.c"))


def digest() -> str:
    """SHA-256 of the sources and headers, which is compiled into the library; "" if there are none."""
    files = [*sources(), *sorted(FOLDER.glob("*.h"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest() if files else ""


def compiler(machine: str = "") -> list[str] | None:
    """The command of a C compiler with the flags for its target, or None.

    Args:
        machine: An architecture of `ZIG_CPUS`: the target is Linux on it, and Zig compiles, on any system. "" is this system.
    """
    if machine:
        return _zig(machine)
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    named = shlex.split(os.environ.get("CC", ""))
    for command in (named, ["cc"], ["gcc"], ["clang"]):
        if command and shutil.which(command[0]):
            return [*command, *(["-march=x86-64"] if x86 else [])]
    return _zig("x86_64" if x86 else platform.machine()) if platform.system() == "Linux" else None


def _zig(machine: str) -> list[str] | None:
    if machine not in ZIG_CPUS or not importlib.util.find_spec("ziglang"):
        return None
    return [sys.executable, "-m", "ziglang", "cc", "-target", f"{machine}-linux-gnu.{GLIBC}", f"-mcpu={ZIG_CPUS[machine]}"]


def build(out: Path = LIBRARY, extra: Sequence[str] = (), machine: str = "") -> None:
    """Compile the library.

    Args:
        out: The file to write; after a failure there is none.
        extra: More flags.
        machine: See `compiler`.

    Raises:
        BuildError: The system is not supported, or there is no compiler that works.
    """
    if machine not in ("", *ZIG_CPUS) or not machine and platform.system() not in SYSTEMS:
        raise BuildError(f"{machine or platform.system()} is not supported")
    command = compiler(machine)
    if command is None:
        raise BuildError(f"{machine} needs the package ziglang" if machine else "there is no C compiler, and no package ziglang")
    out.unlink(missing_ok=True)  # a process that runs the old library keeps it
    whole = [*command, *FLAGS, *extra, "-shared", f'-DSOURCES="{digest()}"', *map(str, sources()), "-o", str(out), "-lm"]
    try:
        subprocess.run(whole, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as bad:
        out.unlink(missing_ok=True)
        line = next((line for line in bad.stderr.splitlines() if "error" in line), bad.stderr[:200])
        raise BuildError(f"{shlex.join(command)} failed: {line.strip()[:200]}") from None
    except OSError as bad:
        raise BuildError(f"{command[0]} cannot be run ({bad.strerror})") from None


def main() -> int:
    try:
        build()
    except (BuildError, OSError) as bad:
        print(f"the native kernels are not built: {bad}", file=sys.stderr)
        return 2
    print(f"built {LIBRARY}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
