"""Loads the compiled operators and says why when that fails.

The operators are declared and implemented in C++ (``csrc/``), one library per device: the CPU library also holds the
schemas, so every other library needs it.
"""

from __future__ import annotations

import pathlib
import re
from typing import NamedTuple

import torch

_FOLDER = pathlib.Path(__file__).parent
_REMEDY = "Reinstall with `pip install --no-build-isolation .` from a source checkout (needs a C++17 compiler{})."


class Architecture(NamedTuple):
    """A kind of GPU that the CUDA library holds code for; 9.0a has the major number 9 and the minor 0."""

    name: str
    major: int
    minor: int

    @classmethod
    def parse(cls, name: str) -> Architecture:
        major, minor = re.match(r"(\d+)\.(\d)", name).groups()
        return cls(name, int(major), int(minor))

    def runs_on(self, major: int, minor: int) -> bool:
        """Whether a GPU of this compute capability runs the code: within its generation, or compiled by the driver."""
        if "a" in self.name:
            return (major, minor) == (self.major, self.minor)
        return (major, minor) >= (self.major, self.minor) and (major == self.major or self.name.endswith("+PTX"))


def _load(name: str, needs: str = "") -> str | None:
    """Loads one library; returns why it is not usable, or None."""
    path, remedy = _FOLDER / name, _REMEDY.format(needs)
    if not path.exists():
        return f"{path} does not exist: the package was not built, or not for this platform. {remedy}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        reason = error.__cause__ or error  # PyTorch only names the path; the loader says why
        return f"{path} does not load under PyTorch {torch.__version__} (2.10 or later is needed): {reason}. {remedy}"
    return None


def _load_cuda() -> str | None:
    if UNAVAILABLE["cpu"] is not None:
        return UNAVAILABLE["cpu"]
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} was built without CUDA"
    name, needs = "libsparsek_cuda.so", " and nvcc"
    missing = _load(name, needs)
    if missing is None and not hasattr(torch.ops.xformers_sparsek, "cuda_architectures"):
        return f"{_FOLDER / name} is older than this Python code. {_REMEDY.format(needs)}"
    return missing


#: Why the operators of a device type cannot run, or None where they can.
UNAVAILABLE: dict[str, str | None] = {"cpu": _load("libsparsek_cpu.so")}
UNAVAILABLE["cuda"] = _load_cuda()

#: The GPUs that the CUDA library was compiled for.
ARCHITECTURES: tuple[Architecture, ...] = ()
if UNAVAILABLE["cuda"] is None:
    ARCHITECTURES = tuple(map(Architecture.parse, torch.ops.xformers_sparsek.cuda_architectures().split()))


def unavailable(device_type: str) -> str | None:
    """Why this installation has no operators for ``device_type``; None where it has."""
    if device_type == "meta" and UNAVAILABLE["cpu"] is None:
        return None
    if device_type not in UNAVAILABLE:
        return f"xformers_sparsek has no operators for device type {device_type!r} (it has {sorted(UNAVAILABLE)})"
    return UNAVAILABLE[device_type]


def unavailable_on(device: torch.device) -> str | None:
    """Why the operators cannot run on this very device; None where they can."""
    missing = unavailable(device.type)
    if missing is not None or device.type != "cuda":
        return missing
    major, minor = torch.cuda.get_device_capability(device)
    if any(architecture.runs_on(major, minor) for architecture in ARCHITECTURES):
        return None
    names = " ".join(architecture.name for architecture in ARCHITECTURES)
    return (
        f"{device} has compute capability {major}.{minor}, and the CUDA operators were built for {names}: "
        f"rebuild with TORCH_CUDA_ARCH_LIST={major}.{minor} (8.0 or later)"
    )
