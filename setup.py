"""Builds the operators: one plain shared object per device, with no Python C API in it.

Such a library depends neither on the Python version nor, thanks to PyTorch's stable ABI, on the PyTorch version, so one
wheel serves every Python from 3.10 and every PyTorch from 2.10. All other metadata is in pyproject.toml.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import importlib.util
import os
import pathlib
import platform
import shlex
import subprocess
from collections.abc import Callable
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
HEADERS = sorted(str(path.relative_to(ROOT)) for path in CSRC.rglob("*.h"))
# Operators register themselves when a library is loaded; nobody looks up its symbols by name.
EXPORTS = "csrc/exports.map"
# The oldest PyTorch that the libraries load under: PyTorch's headers hide whatever came later.
STABLE_ABI = ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000"]


class Toolchain(NamedTuple):
    """How one library is made: ``compile`` comes before ``source -o object``, ``link`` around the objects."""

    compile: list[str]
    link: tuple[list[str], list[str]]


class Library(Extension):
    """A shared object of the package; its toolchain is looked up only when it is built."""

    def __init__(self, name: str, sources: list[str], toolchain: Callable[[pathlib.Path], Toolchain]) -> None:
        super().__init__(name, sources, depends=[*HEADERS, EXPORTS])  # which puts them into source distributions too
        self.toolchain = toolchain


def cpu_library() -> Library:
    """The schemas and the CPU operators."""
    sources = (path.relative_to(ROOT) for path in CSRC.rglob("*.cpp"))
    return Library(
        "xformers_sparsek.libsparsek_cpu",
        sorted(str(path) for path in sources if "cuda" not in path.parts),
        cpu_toolchain,
    )


def cpu_toolchain(torch: pathlib.Path) -> Toolchain:
    compiler = os.environ.get("CXX", "g++")
    # Vectorised exponentials: these relax errno, traps and the sign of zero, but keep NaN and infinities.
    mathematics = ["-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fopenmp-simd"]
    compile_ = [*shlex.split(compiler), "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    compile_ += [*STABLE_ABI, *mathematics, "-Icsrc", f"-isystem{torch / 'include'}"]
    compile_ += [*shlex.split(os.environ.get("CXXFLAGS", "")), "-c"]
    # PyTorch's libraries export parts of the C++ library, which must come from the C++ library itself.
    libraries = ["-lstdc++", f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
    if platform.machine() == "x86_64" and platform.libc_ver()[0] == "glibc":
        libraries += ["-lmvec", "-lm"]
    # No run path: the library finds PyTorch's because importing torch has loaded them.
    return Toolchain(compile_, ([*shlex.split(compiler), "-shared", f"-Wl,--version-script={EXPORTS}"], libraries))


def torch_folder() -> pathlib.Path:
    """The installed PyTorch; found without importing it, which takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "xformers_sparsek is built against PyTorch's headers, and PyTorch is not installed: "
            "install torch>=2.10 first, or leave out --no-build-isolation"
        )
    return pathlib.Path(spec.origin).parent


def run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, cwd=ROOT)
    except FileNotFoundError:
        raise SystemExit(f"{command[0]} was not found: install a C++17 compiler, or name one in CXX") from None
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"failed with exit code {error.returncode}: {shlex.join(command)}") from None


class BuildLibraries(build_ext):
    """Compiles the sources of each library in parallel and links them."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # no Python version in it

    def build_extension(self, ext: Library) -> None:
        toolchain = ext.toolchain(torch_folder())
        # Beside setup.py rather than in pip's temporary folder, so that a second build compiles what changed only.
        flags = hashlib.sha256(shlex.join(toolchain.compile).encode()).hexdigest()[:8]
        folder = ROOT / "build" / f"{ext.name.rpartition('.')[-1]}-{flags}"
        folder.mkdir(parents=True, exist_ok=True)
        newest_header = max((ROOT / header).stat().st_mtime for header in HEADERS)

        def compiled(source: str) -> str:
            target = folder / (source.replace(os.sep, "_") + ".o")
            newest = max((ROOT / source).stat().st_mtime, newest_header)
            if self.force or not target.exists() or target.stat().st_mtime < newest:
                unfinished = target.with_suffix(f".{os.getpid()}.o")
                run([*toolchain.compile, source, "-o", str(unfinished)])
                unfinished.replace(target)
            return str(target)

        with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            objects = list(pool.map(compiled, ext.sources))
        output = pathlib.Path(self.get_ext_fullpath(ext.name)).absolute()
        output.parent.mkdir(parents=True, exist_ok=True)
        # A new file, not the old one overwritten: a process may have that mapped.
        unfinished = output.with_suffix(f".{os.getpid()}.so")
        before, after = toolchain.link
        run([*before, *objects, *after, "-o", str(unfinished)])
        unfinished.replace(output)


class TagWheel(bdist_wheel):
    """Tags the wheel for every Python 3 on this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(ext_modules=[cpu_library()], cmdclass={"build_ext": BuildLibraries, "bdist_wheel": TagWheel})
