"""What the tests of bad input share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

INT, FLOAT8, COMPLEX = torch.int32, torch.float8_e4m3fn, torch.complex64


def f(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Zeros."""
    return torch.zeros(shape, device=device).to(dtype)


def moved(value: Any, device: torch.device) -> Any:
    """``value``, where it is or holds tensors on the CPU with those on ``device``; others stay where they are."""
    if isinstance(value, Tensor):
        return value.to(device) if value.device.type == "cpu" else value
    if isinstance(value, (tuple, list)):
        return type(value)(moved(x, device) for x in value)
    return {name: moved(x, device) for name, x in value.items()} if isinstance(value, dict) else value


def said(fragments: list[str], device: torch.device) -> list[str]:
    """What a message about CPU tensors says when they were moved to ``device``."""
    return [fragment.replace("on cpu", f"on {torch.empty(0, device=device).device}") for fragment in fragments]


def refusal(function: Callable, error: type[Exception], fragments: list[str], *args: Any, **options: Any) -> str:
    """The message of the one exception, of exactly this type, that names every fragment."""
    with pytest.raises(Exception) as caught:
        function(*args, **options)
    message = str(caught.value)
    assert type(caught.value) is error, message
    assert caught.value.__context__ is None, "one exception, not one on top of another"
    for fragment in fragments:
        assert fragment in message
    return message
