"""The build hook of the wheel and of an editable install: compiles the engine's native kernels (fedtune/inference/engine/native).

The system's C compiler is used if there is one, else Zig's, which the build then asks for. If neither works, the install has no native
kernels: the engine then needs torch, and says so. FEDTUNE_NATIVE=off skips the kernels. FEDTUNE_WHEEL=x86_64 or aarch64 makes a wheel for
Linux on that architecture, with Zig, on any machine (packaging/wheels.py).
"""

import importlib.util
import os
import platform
import shutil
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = Path("fedtune/inference/engine/native")
ZIG = "ziglang>=0.13"


class NativeKernels(BuildHookInterface):
    """Builds kernels.so and puts it into the wheel, whose tag then names a platform.

    The file is in the source tree, or for FEDTUNE_WHEEL in a temporary folder.
    """

    folder: str | None = None  # the temporary one

    def dependencies(self) -> list[str]:
        if self._is_off:
            return []
        if self._machine:
            return [ZIG]
        known = platform.system() == "Linux" and platform.machine() in self._build.ZIG_CPUS
        return [ZIG] if known and self._build.compiler() is None else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self._is_off:
            return
        build, machine = self._build, self._machine if version == "standard" else ""
        out = build.LIBRARY
        if machine:
            self.folder = tempfile.mkdtemp()
            out = Path(self.folder) / out.name
        try:
            build.build(out, machine=machine)
        except (build.BuildError, OSError) as bad:
            if machine:
                self.app.abort(f"fedtune's native kernels are not built: {bad}")
            self.app.display_warning(f"fedtune's native kernels are not built: {bad}; the engine needs torch then")
            return
        if version == "standard":
            system = f"manylinux_{build.GLIBC}_{machine}" if machine else sysconfig.get_platform()
            build_data["tag"] = f"py3-none-{system.replace('-', '_').replace('.', '_')}"
            build_data["pure_python"] = False
            if machine:
                build_data["force_include"][str(out)] = str(NATIVE / out.name)
            else:
                build_data["artifacts"].append(f"/{NATIVE / out.name}")

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if self.folder:
            shutil.rmtree(self.folder)

    @property
    def _is_off(self) -> bool:
        return os.environ.get("FEDTUNE_NATIVE") == "off"

    @property
    def _machine(self) -> str:
        return os.environ.get("FEDTUNE_WHEEL", "")

    @property
    def _build(self) -> ModuleType:
        """native/build.py, without importing fedtune, whose libraries are not installed yet."""
        spec = importlib.util.spec_from_file_location("native_build", Path(self.root) / NATIVE / "build.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
