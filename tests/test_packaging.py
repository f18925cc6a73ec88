"""The built wheel, the libraries in it, and what happens where one is missing or does not load."""

from __future__ import annotations

import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile

import pytest
import torch

import xformers_sparsek

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = pathlib.Path(xformers_sparsek.__file__).parent
LIBRARY = "libsparsek_cpu.so"
CUDA_LIBRARY = "libsparsek_cuda.so"
# The CUDA library is tested where the package under test has it, as after `make test`; it takes minutes to build.
HAS_CUDA = (PACKAGE / CUDA_LIBRARY).exists()
LIBRARIES = [LIBRARY, *([CUDA_LIBRARY] if HAS_CUDA else [])]
# For the objects that were compiled already, unless somebody says otherwise.
ARCHITECTURES = os.environ.get("TORCH_CUDA_ARCH_LIST", "9.0a")


def run(*command: object, cwd: pathlib.Path | None = None, **environment: str) -> str:
    environment = {**os.environ, **environment}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_with(folder: pathlib.Path, program: str) -> str:
    """What ``program`` prints in a process that finds the package in ``folder``, not the one under test."""
    check = f"import xformers_sparsek as p; assert p.__file__.startswith({str(folder)!r}), p.__file__\n"
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return run(sys.executable, "-c", check + textwrap.dedent(program), cwd=folder, PYTHONPATH=path)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A copy of the source tree as a checkout has it, with the objects that were compiled from it already."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy2(ROOT / name, folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copytree(
        ROOT / "xformers_sparsek", folder / "xformers_sparsek", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    for objects in ROOT.glob("build/libsparsek_*"):
        shutil.copytree(objects, folder / "build" / objects.name)
    return folder


def build_wheel(source: pathlib.Path, folder: pathlib.Path, **environment: str) -> tuple[pathlib.Path, str]:
    """The wheel, and what was printed."""
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, "--log", folder / "log")
    run(sys.executable, "-m", "pip", "wheel", *options, source, **environment)
    (path,) = folder.glob("*.whl")
    return path, (folder / "log").read_text()


def files_of(wheel: pathlib.Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def wheel(source: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    environment = {"XFORMERS_SPARSEK_CUDA": str(int(HAS_CUDA)), "TORCH_CUDA_ARCH_LIST": ARCHITECTURES}
    return build_wheel(source, tmp_path_factory.mktemp("wheel"), **environment)[0]


@pytest.fixture(scope="module")
def installed(wheel: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_wheel_serves_every_python_3(wheel: pathlib.Path) -> None:
    machine = re.escape(platform.machine())
    version = re.escape(xformers_sparsek.__version__)
    assert re.fullmatch(rf"xformers_sparsek-{version}-py3-none-\w*linux\w*_{machine}\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        info = f"xformers_sparsek-{xformers_sparsek.__version__}.dist-info"
        tags = archive.read(f"{info}/WHEEL").decode()
        metadata = archive.read(f"{info}/METADATA").decode()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "xformers_sparsek").rglob("*.py")}
    assert files_of(wheel) == modules | {f"xformers_sparsek/{library}" for library in LIBRARIES}
    assert "Root-Is-Purelib: false" in tags
    assert re.search(r"^Tag: py3-none-\w+$", tags, re.MULTILINE)
    assert "Requires-Python: >=3.10\n" in metadata
    assert "Requires-Dist: torch>=2.10\n" in metadata


def test_wheel_works_where_it_is_installed(installed: pathlib.Path) -> None:
    program = """
    import torch
    x = torch.ones(1, 4, 2, 8)
    print(tuple(p.sparsek_attention(x, x, x, x[..., 0], 2).shape))
    """
    assert run_with(installed, program) == "(1, 4, 2, 8)\n"


@pytest.mark.parametrize("name", LIBRARIES)
def test_library_depends_on_no_python_and_no_version(name: str, installed: pathlib.Path) -> None:
    """Beside the C and C++ run time it may use only PyTorch's stable C functions."""
    library = installed / "xformers_sparsek" / name
    lines = run("nm", "--dynamic", "--undefined-only", library).splitlines()
    symbols = {line.split()[-1] for line in lines}
    torch_symbols = {symbol for symbol in symbols if re.match(r"(aoti_)?torch_", symbol)}
    assert torch_symbols
    # Run-time libraries version their symbols (`exp@GLIBC_2.29`); weak ones (`w`) may stay undefined.
    others = {line.split()[-1] for line in lines if "@" not in line and line.split()[0] == "U"} - torch_symbols
    assert not others
    assert not [symbol for symbol in symbols if re.match(r"_?Py", symbol)]
    assert not [symbol for symbol in symbols if re.match(r"_ZNK?(S\w)?(2at|3c10|5torch)", symbol)]
    dynamic = run("readelf", "--dynamic", "--wide", library)
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", dynamic))
    system = r"(libstdc\+\+|libgcc_s|libm|libmvec|libc|libdl|librt|libpthread|ld-linux[-\w]*)\.so\.\d+"
    from_torch = {library for library in needed if not re.fullmatch(system, library)}
    cuda = {"libtorch_cuda.so"} if name == CUDA_LIBRARY else set()
    assert from_torch - {"libc10.so"} == {"libtorch_cpu.so"} | cuda
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


@pytest.mark.parametrize("name", LIBRARIES)
def test_library_keeps_its_names_to_itself(name: str, installed: pathlib.Path) -> None:
    """What a library exports can be mistaken for another one's function of that name."""
    exported = run("nm", "--dynamic", "--defined-only", installed / "xformers_sparsek" / name)
    assert not exported.strip()


def test_wheel_without_cuda(source: pathlib.Path, wheel: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """It says so, and holds nothing that the build before it left behind."""
    path, printed = build_wheel(source, tmp_path, XFORMERS_SPARSEK_CUDA="0")
    assert "building without xformers_sparsek.libsparsek_cuda: XFORMERS_SPARSEK_CUDA=0" in printed
    assert files_of(path) == files_of(wheel) - {f"xformers_sparsek/{CUDA_LIBRARY}"}


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch was built with CUDA")
def test_pytorch_without_cuda(installed: pathlib.Path) -> None:
    """The CUDA library is not loaded, and whoever wants it is told why."""
    program = """
    import torch
    import xformers.ops as xops
    from xformers_sparsek import _library
    from xformers_sparsek.xformers_ops import SIMT
    print(p._library.UNAVAILABLE["cuda"])
    x = torch.ones(1, 4, 2, 8)
    try:
        xops.memory_efficient_attention(x, x, x, p.SparseKBias(x[..., 0], 2), op=SIMT)
    except ValueError as error:
        print(error)
    print("libsparsek_cuda" in open("/proc/self/maps").read())
    """
    told, *refusal, loaded = run_with(installed, program).splitlines()
    assert told == f"PyTorch {torch.__version__} was built without CUDA"
    assert any("device=cpu" in line for line in refusal)
    assert loaded == "False"


def test_source_distribution_is_complete(source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    build = f"import setuptools.build_meta as b; b.build_sdist({str(tmp_path)!r})"
    run(sys.executable, "-c", build, cwd=source)
    (archive,) = tmp_path.iterdir()
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    needed = {"setup.py", "pyproject.toml", "README.md"}
    for folder, suffixes in (("csrc", (".h", ".cuh", ".cpp", ".cu")), ("xformers_sparsek", (".py",))):
        needed |= {str(p.relative_to(ROOT)) for p in (ROOT / folder).rglob("*") if p.suffix in suffixes}
    assert needed <= names


# ---------------------------------------------------------------------------------------- a library that does not load

# Everything that needs no operator works; the first call that does fails with all that the user needs to know.
WITHOUT_OPERATORS = """
import torch
import xformers.ops as xops
from xformers.info import get_features_status

scores = torch.randn(1, 4, 2, requires_grad=True)
p.sparsek(scores, 2).sum().backward()
bias = p.SparseKBias(scores, 2)
bias.materialize((1, 2, 4, 4))
p.SparseKScorer(8, 2)(torch.ones(1, 4, 8))
x = torch.ones(1, 4, 2, 8)
for name, status in get_features_status().items():
    if "sparsek" in name:
        print(name, status)
for call in (
    lambda: p.sparsek_attention(x, x, x, scores, 2),
    lambda: xops.memory_efficient_attention(x, x, x, bias),
    lambda: xops.memory_efficient_attention(x, x, x, bias, op=p.xformers_ops.CPU),
):
    try:
        call()
    except Exception as error:
        print(type(error).__name__, str(error).replace("\\n", " "))
"""


def _break_nothing_but(library: bytes | None, folder: pathlib.Path) -> list[str]:
    """Lines that the program prints with this content of the library, or without one."""
    shutil.copytree(PACKAGE, folder / "xformers_sparsek", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if library is not None:
        (folder / "xformers_sparsek" / LIBRARY).write_bytes(library)
    lines = run_with(folder, WITHOUT_OPERATORS).splitlines()
    operators, messages = lines[:-3], lines[-3:]
    assert len(operators) == 9
    assert all(
        line.startswith("memory_efficient_attention.sparsek") and line.endswith("unavailable") for line in operators
    )
    errors = ["ValueError", "NotImplementedError", "ValueError"]
    for error, line in zip(errors, messages, strict=True):
        assert line.startswith(error + " "), line
        assert str(folder / "xformers_sparsek" / LIBRARY) in line
        assert "pip install" in line
    return messages


def test_missing_library(tmp_path: pathlib.Path) -> None:
    for line in _break_nothing_but(None, tmp_path):
        assert "does not exist" in line


BROKEN = {
    "empty": (lambda library: b"", "file too short"),
    "cut off": (lambda library: library[:100], "cannot read file data"),
    "no library": (lambda library: b"404: not found\n" * 1000, "invalid ELF header"),
    # Bytes 18 and 19 name the machine.
    "for another machine": (
        lambda library: library[:18] + b"\xff\xff" + library[20:],
        "cannot open shared object file",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_library(name: str, tmp_path: pathlib.Path) -> None:
    damage, reason = BROKEN[name]
    for line in _break_nothing_but(damage((PACKAGE / LIBRARY).read_bytes()), tmp_path):
        assert reason in line
        assert f"does not load under PyTorch {torch.__version__}" in line


def test_older_cuda_library(installed: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """It loads, but lacks an operator that Python asks for: the CPU's operators work, and the reason is told."""
    shutil.copytree(
        installed / "xformers_sparsek", tmp_path / "xformers_sparsek", ignore=shutil.ignore_patterns("*cuda.so")
    )
    library = tmp_path / "xformers_sparsek" / CUDA_LIBRARY
    (tmp_path / "older.c").write_text("int older;")
    run(os.environ.get("CC", "gcc"), "-shared", "-fPIC", tmp_path / "older.c", "-o", library)
    program = """
    import torch
    torch.version.cuda = torch.version.cuda or "13.0"
    import xformers_sparsek as p
    print(p.__file__)
    print(p._library.UNAVAILABLE["cpu"], p._library.UNAVAILABLE["cuda"], p._library.ARCHITECTURES)
    """
    where, told = run(sys.executable, "-c", textwrap.dedent(program), cwd=tmp_path, PYTHONPATH=tmp_path).splitlines()
    assert where.startswith(str(tmp_path))
    assert told.startswith(f"None {library} is older than this Python code. Reinstall with `pip install")
    assert told.endswith(" ()")


def test_library_for_a_newer_torch(tmp_path: pathlib.Path) -> None:
    """Built against headers that call what this PyTorch does not have."""
    source = tmp_path / "newer.c"
    source.write_text("void torch_from_the_future(void); void f(void) { torch_from_the_future(); }")
    run(os.environ.get("CC", "gcc"), "-shared", "-fPIC", source, "-o", tmp_path / "newer.so")
    for line in _break_nothing_but((tmp_path / "newer.so").read_bytes(), tmp_path):
        assert "undefined symbol: torch_from_the_future" in line
