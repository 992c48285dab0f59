"""Builds the C++ core with CMake and ninja; everything else is declared in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCE = Path(__file__).parent.resolve() / "csrc"
STRICT = os.environ.get("GFLOWGR_STRICT", "0") == "1"
WITHOUT_CPP = os.environ.get("GFLOWGR_WITHOUT_CPP", "0") == "1"
HELP = (
    "gflowgr's C++ core needs cmake >= 3.22, ninja and a C++20 compiler. "
    "GFLOWGR_WITHOUT_CPP=1 installs without it: the ops then run in plain PyTorch on the CPU."
)


class CMakeExtension(Extension):
    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
        if cmake is None or ninja is None:
            raise CompileError(f"{'ninja' if cmake else 'cmake'} was not found. {HELP}")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / ext.name
        build.mkdir(parents=True, exist_ok=True)
        # It may hold paths into the isolated environment of an earlier build, which is gone.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        configure = [
            cmake, "-S", str(SOURCE), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DGFLOWGR_STRICT={'ON' if STRICT else 'OFF'}",
        ]  # fmt: skip
        try:
            subprocess.run(configure, check=True)
            subprocess.run([cmake, "--build", str(build), "--parallel"], check=True)
        except subprocess.CalledProcessError as error:
            raise CompileError(f"{' '.join(error.cmd)} failed, see above. {HELP}") from error


setup(
    ext_modules=[] if WITHOUT_CPP else [CMakeExtension("gflowgr._core")],
    cmdclass={"build_ext": CMakeBuild},
)
