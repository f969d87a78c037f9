"""Builds the wheels for Linux on x86-64 and aarch64: `python packaging/wheels.py FOLDER`. Needs the package build, but no C compiler.

Further arguments go to `python -m build`; `--no-isolation` uses the installed hatchling and ziglang.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    if len(sys.argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    for machine in ("x86_64", "aarch64"):
        command = [sys.executable, "-m", "build", "--wheel", "--outdir", *sys.argv[1:], str(ROOT)]
        if code := subprocess.run(command, env=os.environ | {"FEDTUNE_WHEEL": machine}).returncode:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
