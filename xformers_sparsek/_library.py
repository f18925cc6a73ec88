"""Loads the compiled operators and says why when that fails.

The operators are declared and implemented in C++ (``csrc/``), one library per device: the CPU library also holds the
schemas, so every other library needs it.
"""

from __future__ import annotations

import pathlib

import torch

_FOLDER = pathlib.Path(__file__).parent
_REMEDY = "Reinstall with `pip install --no-build-isolation .` from a source checkout (needs a C++17 compiler)."


def _load(name: str) -> str | None:
    """Loads one library; returns why it is not usable, or None."""
    path = _FOLDER / name
    if not path.exists():
        return f"{path} does not exist: the package was not built, or not for this platform. {_REMEDY}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        reason = error.__cause__ or error  # PyTorch only names the path; the loader says why
        return f"{path} does not load under PyTorch {torch.__version__} (2.10 or later is needed): {reason}. {_REMEDY}"
    return None


#: Why the operators of a device type cannot run, or None where they can.
UNAVAILABLE: dict[str, str | None] = {"cpu": _load("libsparsek_cpu.so")}


def unavailable(device_type: str) -> str | None:
    """Why this installation has no operators for ``device_type``; None where it has."""
    if device_type == "meta" and UNAVAILABLE["cpu"] is None:
        return None
    if device_type not in UNAVAILABLE:
        return f"xformers_sparsek has no operators for device type {device_type!r} (it has {sorted(UNAVAILABLE)})"
    return UNAVAILABLE[device_type]
