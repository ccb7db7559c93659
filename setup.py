"""Builds archer_fast._C with CMake and Ninja; everything else about the package is in pyproject.toml.

CMAKE_ARGS in the environment is handed to cmake, e.g. CMAKE_ARGS=-DARCHER_WARNINGS_AS_ERRORS=OFF.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def build_tool(name: str, folder_attribute: str) -> str:
    """The program of the Python package `name` beside this interpreter, else the one on PATH."""
    try:
        folder = getattr(import_module(name), folder_attribute)
    except (ImportError, AttributeError):
        folder = None
    found = shutil.which(name, path=folder) if folder else shutil.which(name)
    if found is None:
        raise RuntimeError(f"{name}: wanted the program on PATH or as a Python package, found neither")
    return found


class CMakeBuild(build_ext):
    """One CMake project builds the one extension."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        cmake = build_tool("cmake", "CMAKE_BIN_DIR")
        ninja = build_tool("ninja", "BIN_DIR")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # One for every Python, and kept: the core, half of the work, is compiled once for all of them.
        build_folder = ROOT / "build" / "cmake"
        build_folder.mkdir(parents=True, exist_ok=True)
        # An isolated build's tools are gone at the next build, but the cache would still name them.
        (build_folder / "CMakeCache.txt").unlink(missing_ok=True)
        configure = [
            cmake,
            f"-S{ROOT}",
            f"-B{build_folder}",
            "-GNinja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build_folder / 'lib'}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build_folder), "--target", "_C"], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # a process that has it mapped keeps the old file
        shutil.copy2(build_folder / "lib" / target.name, target)


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


setup(
    ext_modules=[
        Extension(
            "archer_fast._C",
            sources=sources("csrc/*.cpp", "csrc/python/*.cpp"),
            depends=["CMakeLists.txt", *sources("csrc/*.h", "csrc/python/*.h")],
        )
    ],
    cmdclass={"build_ext": CMakeBuild},
)
