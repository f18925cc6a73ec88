"""Builds the operators: one plain shared object per device, with no Python C API in it.

Such a library depends neither on the Python version nor, thanks to PyTorch's stable ABI, on the PyTorch version, so one
wheel serves every Python from 3.10 and every PyTorch from 2.10. The CUDA library is left out where there is no nvcc.
All other metadata is in pyproject.toml.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import importlib.util
import os
import pathlib
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).resolve().parent
BUILD = ROOT / "build"
CSRC = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file())
# Operators register themselves when a library is loaded; nobody looks up its symbols by name.
EXPORTS = "csrc/exports.map"
# The oldest PyTorch that the libraries load under: PyTorch's headers hide whatever came later.
STABLE_ABI = ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
# What the CUDA library holds code for, unless TORCH_CUDA_ARCH_LIST says otherwise; what nvcc does not know is left out.
ARCHITECTURES = "8.0 9.0a 10.0 12.0"


class Toolchain(NamedTuple):
    """How one library is made."""

    compile: dict[str, list[str]]  # for each source, what comes before `-c source -o object`
    link: tuple[list[str], list[str]]  # what comes before and after the objects


class Library(Extension):
    """A shared object of the package; its toolchain is looked up only when it is built.

    ``missing`` says why this machine cannot build it, or gives None.
    """

    def __init__(
        self,
        name: str,
        sources: list[str],
        toolchain: Callable[[list[str], pathlib.Path], Toolchain],
        missing: Callable[[], str | None] = lambda: None,
    ) -> None:
        super().__init__(name, sources, depends=CSRC)  # source distributions hold them all, whatever is built
        self.toolchain, self.missing = toolchain, missing


def sources(suffixes: tuple[str, ...], *folders: str) -> list[str]:
    return [path for path in CSRC if path.endswith(suffixes) and path.startswith(folders)]


def cpu_library() -> Library:
    """The schemas and the CPU operators."""
    found = sources((".cpp",), "csrc/schema.cpp", "csrc/common/", "csrc/cpu/")
    return Library("xformers_sparsek.libsparsek_cpu", found, cpu_toolchain)


def cuda_library() -> Library:
    found = sources((".cpp", ".cu"), "csrc/common/", "csrc/cuda/")
    return Library("xformers_sparsek.libsparsek_cuda", found, cuda_toolchain, missing_cuda)


def cpu_toolchain(sources: list[str], torch: pathlib.Path) -> Toolchain:
    # Vectorised exponentials: these relax errno, traps and the sign of zero, but keep NaN and infinities.
    mathematics = ["-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fopenmp-simd"]
    command = cpp_command(torch, *mathematics)
    libraries = torch_libraries(torch)
    if platform.machine() == "x86_64" and platform.libc_ver()[0] == "glibc":
        libraries += ["-lmvec", "-lm"]
    return Toolchain(dict.fromkeys(sources, command), (link_command(), libraries))


def cuda_toolchain(sources: list[str], torch: pathlib.Path) -> Toolchain:
    nvcc = find_nvcc()
    toolkit = toolkit_of(nvcc)
    chosen = architectures(nvcc)
    has_hopper = any(architecture.number == 90 for architecture in chosen)
    # The operators choose among the kernels that are there, and tell Python which GPUs they were compiled for.
    names = " ".join(map(str, chosen))
    options = ["-DUSE_CUDA", *(["-DSPARSEK_SM90"] if has_hopper else [])]

    host = os.environ.get("NVCC_CCBIN") or cxx()[0]
    kernel = [nvcc, "-ccbin", host, "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xfatbin", "-compress-all"]
    kernel += ["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall", *STABLE_ABI, *options]
    kernel += ["-Icsrc", "-isystem", str(torch / "include")]
    portable = [flag for architecture in chosen for flag in architecture.flags()]
    hopper = Architecture(9, 0, "a", False).flags()
    code = cpp_command(torch, *options, f'-DSPARSEK_ARCHITECTURES="{names}"', f"-isystem{toolkit / 'include'}")

    commands = {}
    for source in sources:
        if source.endswith(".cpp"):
            commands[source] = code
        elif not source.startswith("csrc/cuda/sm90/"):
            commands[source] = [*kernel, *portable]
        elif has_hopper:
            commands[source] = [*kernel, *hopper]

    run_time = [f"-L{toolkit / folder}" for folder in ("lib64", "lib")]
    run_time += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    # A PyTorch for the CPU has no libtorch_cuda.so; a library of that name is all that linking needs.
    stub = BUILD / "stub" / "libtorch_cuda.so"
    stub.parent.mkdir(parents=True, exist_ok=True)
    run([*cxx(), "-shared", "-Wl,-soname,libtorch_cuda.so", "-x", "c", os.devnull, "-o", str(stub)])
    needed = [f"-L{stub.parent}", "-Wl,--no-as-needed", "-ltorch_cuda"]
    return Toolchain(commands, (link_command(), [*torch_libraries(torch), *run_time, *needed]))


def cxx() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++"))


def cpp_command(torch: pathlib.Path, *options: str) -> list[str]:
    command = [*cxx(), "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", *STABLE_ABI, *options]
    return [*command, "-Icsrc", f"-isystem{torch / 'include'}", *shlex.split(os.environ.get("CXXFLAGS", ""))]


def link_command() -> list[str]:
    # No run path: a library finds PyTorch's because importing torch has loaded them.
    return [*cxx(), "-shared", f"-Wl,--version-script={EXPORTS}"]


def torch_libraries(torch: pathlib.Path) -> list[str]:
    # PyTorch's libraries export parts of the C++ library, which must come from the C++ library itself.
    return ["-lstdc++", f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]


def torch_folder() -> pathlib.Path:
    """The installed PyTorch; found without importing it, which takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "xformers_sparsek is built against PyTorch's headers, and PyTorch is not installed: "
            "install torch>=2.10 first, or leave out --no-build-isolation"
        )
    return pathlib.Path(spec.origin).parent


class Architecture(NamedTuple):
    """One entry of TORCH_CUDA_ARCH_LIST, such as 9.0a or 12.0+PTX."""

    major: int
    minor: int
    suffix: str
    ptx: bool

    @classmethod
    def parse(cls, name: str) -> Architecture:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if match is None:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: expected numbers such as 8.0, 9.0a or 12.0+PTX, got {name!r}")
        return cls(int(match[1]), int(match[2]), match[3], match[4] is not None)

    @property
    def number(self) -> int:
        return 10 * self.major + self.minor

    def flags(self) -> list[str]:
        name = f"{self.number}{self.suffix}"
        codes = [f"sm_{name}", *([f"compute_{name}"] if self.ptx else [])]
        return [f"-gencode=arch=compute_{name},code={code}" for code in codes]

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}{self.suffix}{'+PTX' if self.ptx else ''}"


def architectures(nvcc: str) -> list[Architecture]:
    """What TORCH_CUDA_ARCH_LIST names, or what we support of it: the kernels need compute capability 8.0."""
    listed = re.findall(r"[^\s;,]+", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    named = [Architecture.parse(name) for name in listed or ARCHITECTURES.split()]
    if not listed:
        known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
        named = [architecture for architecture in named if f"sm_{architecture.number}" in known]
    supported = [architecture for architecture in named if architecture.major >= 8]
    if not supported:
        raise SystemExit(
            f"no CUDA architecture of {' '.join(listed)} is 8.0 or later (XFORMERS_SPARSEK_CUDA=0: no CUDA)"
        )
    return supported


def find_nvcc() -> str | None:
    """From $CUDA_HOME, from $PATH, or from the wheel nvidia-cuda-nvcc in this environment."""
    home = os.environ.get("CUDA_HOME")
    wheels = importlib.util.find_spec("nvidia")
    folders = [pathlib.Path(home) / "bin"] if home else []
    folders += [pathlib.Path(folder) for folder in os.environ.get("PATH", os.defpath).split(os.pathsep)]
    folders += [pathlib.Path(path) / "cu13" / "bin" for path in (wheels.submodule_search_locations if wheels else [])]
    return shutil.which("nvcc", path=os.pathsep.join(map(str, folders)))


def missing_cuda() -> str | None:
    wanted = os.environ.get("XFORMERS_SPARSEK_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"XFORMERS_SPARSEK_CUDA must be 0, 1 or not set, got {wanted!r}")
    if wanted == "0":
        return "XFORMERS_SPARSEK_CUDA=0"
    if find_nvcc() is None:
        reason = "no nvcc in $CUDA_HOME/bin, in $PATH or from the wheel nvidia-cuda-nvcc"
        if wanted == "1":
            raise SystemExit(f"XFORMERS_SPARSEK_CUDA=1, but there is {reason}")
        return reason
    return None


def toolkit_of(nvcc: str) -> pathlib.Path:
    """The folder with nvcc's headers and libraries; nvcc in $PATH is a script that starts the real one at times."""
    command = [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return pathlib.Path(re.search(r"^#\$ TOP=(.*)$", printed, re.MULTILINE)[1]).resolve()


def run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, cwd=ROOT)
    except FileNotFoundError:
        raise SystemExit(f"{command[0]} was not found: install a C++17 compiler, or name one in CXX") from None
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"failed with exit code {error.returncode}: {shlex.join(command)}") from None


def newest_change(target: pathlib.Path) -> float:
    """When one of the files that ``target`` was compiled from changed last; now, where that is not known."""
    try:
        rule = target.with_suffix(".d").read_text()
        return max((ROOT / path).stat().st_mtime for path in rule.partition(":")[2].replace("\\\n", " ").split())
    except FileNotFoundError:  # not compiled yet, or from a file that is gone
        return float("inf")


class BuildLibraries(build_ext):
    """Compiles the sources of each library in parallel and links them."""

    def finalize_options(self) -> None:
        super().finalize_options()
        reasons = [(library, library.missing()) for library in self.extensions]
        self.extensions = [library for library, reason in reasons if reason is None]
        self.left_out = [(library, reason) for library, reason in reasons if reason is not None]

    def run(self) -> None:
        for library, reason in self.left_out:
            print(f"building without {library.name}: {reason}")
            # An earlier build may have left one, which must not go into a wheel.
            (pathlib.Path(self.build_lib) / self.get_ext_filename(library.name)).unlink(missing_ok=True)
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # no Python version in it

    def build_extension(self, ext: Library) -> None:
        toolchain = ext.toolchain(ext.sources, torch_folder())
        # Beside setup.py rather than in pip's temporary folder, so that a second build compiles what changed only.
        folder = BUILD / ext.name.rpartition(".")[-1]
        folder.mkdir(parents=True, exist_ok=True)

        def compiled(source: str) -> str:
            command = toolchain.compile[source]
            flags = hashlib.sha256(shlex.join(command).encode()).hexdigest()[:8]
            target = folder / f"{source.replace(os.sep, '_')}-{flags}.o"
            if self.force or not target.exists() or target.stat().st_mtime < newest_change(target):
                unfinished = target.with_suffix(f".{os.getpid()}.o")
                run([*command, "-MMD", "-MF", str(target.with_suffix(".d")), "-c", source, "-o", str(unfinished)])
                unfinished.replace(target)
            return str(target)

        with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            objects = list(pool.map(compiled, toolchain.compile))
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


setup(ext_modules=[cpu_library(), cuda_library()], cmdclass={"build_ext": BuildLibraries, "bdist_wheel": TagWheel})
