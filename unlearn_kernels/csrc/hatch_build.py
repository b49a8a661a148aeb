"""Builds the C kernels into the wheel. Without a C compiler the wheel is pure Python, and the build says so.

The library has a C ABI and no Python or torch in it: one wheel per platform serves every version of both.
`CC` and `CFLAGS` are honoured. `UNLEARN_KERNELS_BUILD=0` leaves the library out; `=1` fails if it cannot be built.
"""

import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCES = Path(__file__).parent
VARIABLE = "UNLEARN_KERNELS_BUILD"
# -ffast-math is left out on purpose: gcc 12 would link code that makes the whole process flush denormals to zero.
FLAGS = (
    *("-std=c11", "-O3", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-ffp-contract=fast", "-fopenmp-simd"),
    # Vectors stay inside the library, so the ABI for passing them does not matter.
    "-Wno-psabi",
    # Words are read as floats and back, within a function and, under CFLAGS=-flto, across files.
    "-fno-strict-aliasing",
)


class NoCompiler(RuntimeError):
    """There is no working C compiler."""


def compile_library(target: Path) -> None:
    """Compile the sources into the shared library `target`. Raises NoCompiler with the compiler's message."""
    names = shlex.split(os.environ.get("CC", "")) or ["cc"]
    if shutil.which(names[0]) is None:
        raise NoCompiler(f"{names[0]} is not on the PATH")
    sources = [str(source) for source in sorted(SOURCES.glob("*.c"))]
    # Written beside the target and renamed, so that a process that has loaded the old library keeps it.
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    command = [*names, *FLAGS, *shlex.split(os.environ.get("CFLAGS", "")), *sources, "-o", str(partial)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        partial.unlink(missing_ok=True)
        raise NoCompiler(f"{shlex.join(command)}: {run.stderr.strip()}")
    partial.replace(target)


class KernelsHook(BuildHookInterface):
    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        suffix = sysconfig.get_config_var("SHLIB_SUFFIX") or ".so"
        name = f"libunlearn_kernels{suffix}"
        editable = version == "editable"
        # An editable install runs from the sources; any other build leaves them as they are.
        self._scratch = None if editable else TemporaryDirectory()
        target = (SOURCES.parent if self._scratch is None else Path(self._scratch.name)) / name
        wanted = os.environ.get(VARIABLE, "")
        try:
            if wanted == "0":
                raise NoCompiler(f"{VARIABLE}=0")
            compile_library(target)
        except NoCompiler as error:
            if wanted == "1":
                raise
            target.unlink(missing_ok=True)  # of an earlier install
            self.app.display_warning(f"unlearn_kernels: built without C kernels, plain torch will run: {error}")
            return
        if editable:
            build_data["artifacts"].append(f"/{target.relative_to(self.root)}")
        else:
            build_data["force_include"][str(target)] = f"unlearn_kernels/{name}"
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if self._scratch is not None:
            self._scratch.cleanup()
