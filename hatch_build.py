"""The build hook of the wheel and of an editable install: compiles the engine's native kernels (fedtune/inference/engine/native).

The system's C compiler is used if there is one, else Zig's, which the build then asks for. If neither works, the install has no native
kernels: the engine then needs torch, and says so. FEDTUNE_NATIVE=off skips the kernels.
"""

import importlib.util
import os
import platform
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = Path("fedtune/inference/engine/native")
ZIG = "ziglang>=0.13"
ZIG_MACHINES = ("x86_64", "aarch64")  # of the Linux wheels of ziglang


class NativeKernels(BuildHookInterface):
    """Builds kernels.so in the source tree, and puts it into the wheel, which then has a platform."""

    def dependencies(self) -> list[str]:
        missing = os.environ.get("FEDTUNE_NATIVE") != "off" and self._build.compiler() is None
        return [ZIG] if missing and platform.system() == "Linux" and platform.machine() in ZIG_MACHINES else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if os.environ.get("FEDTUNE_NATIVE") == "off":
            return
        build = self._build
        try:
            build.build()
        except (build.BuildError, OSError) as bad:
            self.app.display_warning(f"fedtune's native kernels are not built: {bad}; the engine needs torch then")
            return
        if version == "standard":
            build_data["artifacts"].append(f"/{NATIVE / build.LIBRARY.name}")
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    @property
    def _build(self) -> ModuleType:
        """native/build.py, without importing fedtune, whose libraries are not installed yet."""
        spec = importlib.util.spec_from_file_location("native_build", Path(self.root) / NATIVE / "build.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
