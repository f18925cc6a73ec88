"""The operators themselves, called past the Python checks: inconsistent tensors give a RuntimeError, never a crash."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from refusals import moved
from torch import Tensor

import xformers_sparsek  # noqa: F401  (loads the operators)

Arguments = dict[str, Any]
OPERATORS = torch.ops.xformers_sparsek
PACKED = torch.tensor([0, 10, 10, 70], dtype=torch.int32)


def good(
    name: str, device: torch.device, *, causal: bool = True, hard: bool = False, packed: bool = False
) -> Arguments:
    """Arguments that the operator ``name`` accepts."""
    generator = torch.Generator().manual_seed(0)
    batch, cu_seqlens = (1, PACKED.to(device)) if packed else (2, None)
    shapes = {
        "query": (batch, 70, 4, 8),
        "key": (batch, 70, 2, 8),
        "value": (batch, 70, 2, 5),
        "scores": (batch, 70, 2),
    }
    tensors = {key: torch.randn(shape, generator=generator).to(device) for key, shape in shapes.items()}
    lengths = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    options = {"window": 3 if causal else 0, "causal": causal, "hard": hard}
    select = {"scores": tensors["scores"], **lengths, "num_queries": 70, "num_keys": 5, **options}
    if name == "select":
        return select
    threshold, expiry = OPERATORS.select(**select)
    inputs = {**tensors, "threshold": threshold, "expiry": expiry, **lengths, **options, "scale": 0.5}
    if name == "forward":
        return {**inputs, "out_dtype": None}
    out, lse = OPERATORS.forward(**inputs, out_dtype=None)
    return {"grad_out": torch.ones_like(out), "grad_lse": None, "out": out, "lse": lse, **inputs}


def lengths(*ends: int) -> Tensor:
    return torch.tensor(ends, dtype=torch.int32)


TENSORS = {
    "select": ["scores"],
    "forward": ["query", "key", "value", "scores", "threshold", "expiry"],
    "backward": ["grad_out", "query", "key", "value", "scores", "out", "lse", "threshold", "expiry"],
}
# Ways to make a tensor not fit the others, wherever it is passed.
DAMAGE: dict[str, Callable[[Tensor], Tensor]] = {
    "flattened": lambda x: x.flatten(),
    "unsqueezed": lambda x: x.unsqueeze(0),
    "shorter": lambda x: x[:, :-1],
    "longer": lambda x: torch.cat([x, x], 1),
    "without last dimension": lambda x: x[..., :0],
    "empty batch": lambda x: x[:0],
    "other batch": lambda x: x[:1],
    "integers": lambda x: x.to(torch.int64),
    "complex": lambda x: x.to(torch.complex64),
    "float8": lambda x: x.float().to(torch.float8_e5m2),
    "boolean": lambda x: x > 0,
    "float64": lambda x: x.double(),
    "sparse": lambda x: x.to_sparse(),
}
# With these the tensor still fits.
HARMLESS = {
    ("select", "scores"): {"shorter", "longer", "without last dimension", "empty batch", "other batch", "float64"},
    ("backward", "grad_out"): {"float64"},
    ("backward", "out"): {"float64"},
}
DAMAGED = [
    (operator, tensor, damage)
    for operator, tensors in TENSORS.items()
    for tensor in tensors
    for damage in DAMAGE
    if damage not in HARMLESS.get((operator, tensor), ())
]


@pytest.mark.parametrize(("operator", "tensor", "damage"), DAMAGED)
def test_damaged_tensor(operator: str, tensor: str, damage: str, device: torch.device) -> None:
    arguments = good(operator, device)
    getattr(OPERATORS, operator)(**arguments)
    arguments[tensor] = DAMAGE[damage](arguments[tensor])
    with pytest.raises(RuntimeError):  # NotImplementedError, what the dispatcher raises for sparse ones, is one too
        getattr(OPERATORS, operator)(**arguments)


BAD_OPTIONS: list[tuple[str, Arguments]] = [
    *(("select", change) for change in ({"num_queries": -1}, {"num_keys": 0}, {"num_keys": -(2**60)})),
    ("select", {"num_queries": 2**40}),
    *itertools.product(
        ["select", "forward", "backward"],
        [
            {"window": -1},
            {"window": 2, "causal": False},
            {"cu_seqlens_q": lengths(0, 70)},
            {"cu_seqlens_q": lengths(0, 70), "cu_seqlens_k": lengths(0, 70)},  # of two batch entries
        ],
    ),
    ("forward", {"out_dtype": torch.int32}),
    ("forward", {"out_dtype": torch.float8_e4m3fn}),
    ("backward", {"grad_lse": torch.zeros(2, 4)}),
    ("backward", {"grad_lse": torch.zeros(2, 70, 4)}),
    ("backward", {"grad_lse": torch.zeros(2, 4, 70, dtype=torch.float64)}),
    ("forward", {"query": torch.zeros(2, 70, 3, 8)}),
    ("forward", {"query": torch.zeros(2, 70, 0, 8)}),
    ("forward", {"threshold": torch.zeros(2, 70, 2).transpose(1, 2)}),
    ("forward", {"expiry": torch.zeros(2, 70, 2, dtype=torch.int32).transpose(1, 2)}),
]


@pytest.mark.parametrize(("operator", "change"), BAD_OPTIONS, ids=lambda x: x if isinstance(x, str) else ",".join(x))
def test_bad_option(operator: str, change: Arguments, device: torch.device) -> None:
    with pytest.raises(RuntimeError):
        getattr(OPERATORS, operator)(**(good(operator, device) | moved(change, device)))


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"hard": True}, {"packed": True}], ids=str)
def test_nan_scores(options: dict, device: torch.device) -> None:
    """The CPU refuses them; elsewhere they are NaN thresholds of their own batch entry, sequence and head."""
    arguments = good("select", device, **options)
    expected = OPERATORS.select(**arguments)
    arguments["scores"][-1, 40, 1] = math.nan
    if device.type == "cpu":
        with pytest.raises(RuntimeError, match="NaN"):
            OPERATORS.select(**arguments)
        return
    first = 10 if options.get("packed") else 0
    for x, before in zip(OPERATORS.select(**arguments), expected):
        if x.dtype.is_floating_point:
            assert x[-1, 1, first:].isnan().all()
        x[-1, 1, first:] = before[-1, 1, first:]
        assert torch.equal(x, before)


@pytest.mark.parametrize("name", ["sm80", "sm90", "simt", "mps", ""])
def test_unknown_kernel(name: str, device: torch.device) -> None:
    if device.type == "cuda" and name in ("sm80", "sm90", "simt"):
        pytest.skip("a kernel for CUDA")
    for operator, argument in (
        ("forward", "forward_kernel"),
        *([("forward", "backward_kernel")] if device.type == "cpu" else []),
        ("backward", "backward_kernel"),
    ):
        arguments = good(operator, device)
        with pytest.raises(RuntimeError, match="kernel"):
            getattr(OPERATORS, operator)(**arguments, **{argument: name})


BAD_CONTENTS = [
    (lengths(0, 69), None),
    (lengths(0, 71), None),
    (lengths(1, 70), None),
    (lengths(-1, 70), None),
    (lengths(0, 80, 70), None),
    (lengths(0, -(2**31), 70), None),
    (lengths(0, 70), lengths(0, 2**31 - 1)),
]
BAD_LENGTHS = [
    (lengths(), None),
    (lengths(0, 70).long(), None),
    (lengths(0, 70).float(), None),
    (lengths(0, 70).unsqueeze(0), None),
    (lengths(0, 70), lengths(0, 35, 70)),
]


@pytest.mark.parametrize("operator", ["select", "forward", "backward"])
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("pair", [*BAD_CONTENTS, *BAD_LENGTHS], ids=str)
def test_bad_lengths(pair: tuple[Tensor, Tensor | None], swap: bool, operator: str, device: torch.device) -> None:
    bad, other = pair
    if other is None:  # nothing else is wrong: as many sequences, and all of them good
        other = lengths(*[0] * (bad.numel() - 1), 70)
    both = moved((other, bad) if swap else (bad, other), device)
    good_ones = good(operator, device, packed=True)
    function, arguments = getattr(OPERATORS, operator), good_ones | dict(zip(("cu_seqlens_q", "cu_seqlens_k"), both))
    if device.type != "cpu" and any(
        pair is x for x in BAD_CONTENTS
    ):  # seen by nobody before the kernels: memory must stay whole
        shapes = [x.shape for x in function(**arguments)]
        assert shapes == [x.shape for x in function(**good_ones)]
        torch.accelerator.synchronize()
        return
    with pytest.raises(RuntimeError):
        function(**arguments)


@pytest.mark.parametrize("operator", ["forward", "backward"])
@pytest.mark.parametrize(
    "options", [{}, {"causal": False}, {"hard": True}, {"packed": True}, {"causal": False, "hard": True}], ids=str
)
def test_forged_selection(options: dict, operator: str, device: torch.device) -> None:
    """Thresholds, expiries and log-sum-exps of any contents: the results mean nothing, but memory stays whole."""
    generator = torch.Generator().manual_seed(0)
    function, true = getattr(OPERATORS, operator), good(operator, device, **options)
    expected = function(**true)
    limits = torch.iinfo(torch.int32)
    for low, high in [(0, 71), (-5, 300), (limits.min, limits.max), (limits.max, limits.max + 1), (0, 1)]:
        expiry = torch.randint(low, high, true["expiry"].shape, generator=generator).int().to(device)
        for number in (0.0, math.nan, math.inf, -math.inf):
            forged = true | {"expiry": expiry, "threshold": torch.full_like(true["threshold"], number)}
            if operator == "backward":
                forged["lse"] = torch.full_like(true["lse"], number)
            assert [x.shape for x in function(**forged)] == [x.shape for x in expected]
    for before, after in zip(expected, function(**true)):
        torch.testing.assert_close(after, before, rtol=0, atol=0)
