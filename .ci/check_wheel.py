"""Fail unless the wheel holds every module, YAML and model file of the checkout, the native kernels, and nothing else."""

import platform
import sys
import zipfile
from pathlib import Path

MAPPED = ("strategies", "clients", "simulations", "conf")


def main(wheel: str) -> int:
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    wanted = {str(f) for f in Path("fedtune").rglob("*") if f.is_file() and "__pycache__" not in f.parts}
    wanted |= {f"fedtune/{f}" for folder in MAPPED for f in Path(folder).rglob("*") if f.is_file() and "__pycache__" not in f.parts}
    # named apart: a wrong .gitignore would take them out of both sides
    wanted |= {"fedtune/data/demo.py", "fedtune/strategies/fedavg.py"}
    wanted |= {"fedtune/conf/heterogeneous.yaml", "fedtune/models/nano/model.safetensors"}
    wanted |= {"fedtune/inference/engine/native/kernels.so"}
    if not Path(wheel).stem.endswith(f"py3-none-linux_{platform.machine()}"):
        print(f"{Path(wheel).name} holds compiled kernels, but its name has no platform")
        return 1
    for name in sorted(wanted - names):
        print(f"missing from the wheel: {name}")
    for name in sorted(names - wanted):
        print(f"not of the checkout, in the wheel: {name}")
    print(f"{Path(wheel).name}: {len(names)} files, {Path(wheel).stat().st_size / 1e6:.1f} MB")
    return int(names != wanted)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
