"""Every bad input that comes through xFormers gives one exception that names all reasons and shows the shapes."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
import xformers.ops as xops
from refusals import FLOAT8, INT, f, moved, refusal, said
from torch import Tensor

from xformers_sparsek import SparseKBias
from xformers_sparsek.xformers_ops import CPU, FORWARD_OPERATORS, SIMT

Arguments = dict[str, Any]
BY_HAND = {"cpu": CPU, "cuda": SIMT}


def moved_call(inputs: tuple, device: torch.device) -> tuple:
    """The same call on ``device``: query, key, value and a bias of the same options."""
    *tensors, bias = inputs
    lengths = None if bias.cu_seqlens_q is None else (bias.cu_seqlens_q, bias.cu_seqlens_k)
    options = {"window": bias.window, "causal": bias.causal, "hard": bias.hard, "cu_seqlens": moved(lengths, device)}
    return *moved(tensors, device), SparseKBias(moved(bias.scores, device), bias.k, **options)


def xformers_call(
    scores: Tensor, *, query: Tensor | None = None, other: Tensor | None = None, p: float = 0.0, **options: Any
) -> tuple[tuple, Arguments]:
    """Arguments of memory_efficient_attention: a 4-D query of six heads unless said, and a bias of ``scores``."""
    query = f(2, 5, 6, 8) if query is None else query
    other = query if other is None else other
    scale = options.pop("scale", None)
    return (query, other, other, SparseKBias(scores, **({"k": 2} | options))), {"p": p, "scale": scale}


# Refused by our operators: the dispatcher's error for op=None, and for an operator chosen by hand a ValueError.
BAD_FOR_OPERATORS: dict[str, tuple[tuple[tuple, Arguments], list[str]]] = {
    "dropout": (xformers_call(f(2, 5, 2), p=0.1), ["dropout > 0.0"]),
    "heads": (xformers_call(f(2, 5, 4)), ["query has 6 heads, not a multiple of the 4 heads of scores"]),
    "no heads": (xformers_call(f(2, 5, 0)), ["not a multiple of the 0 heads"]),
    "groups": (xformers_call(f(2, 5, 3), query=f(2, 5, 2, 3, 8)), ["scores have 3 heads, query has 2 head groups"]),
    "length": (xformers_call(f(2, 4, 2)), ["scores has length 4, key has 5"]),
    "batch": (xformers_call(f(1, 5, 2)), ["scores has batch size 1, query has 2"]),
    "float64 scores": (xformers_call(f(2, 5, 2, dtype=torch.float64)), ["scores are float64 but query is"]),
    "device of scores": (xformers_call(f(2, 5, 2, device="meta")), ["scores is on meta, query on cpu"]),
    "device": (xformers_call(f(2, 5, 2), query=f(2, 5, 6, 8, device="meta")), ["device=meta", "scores is on cpu"]),
    "float8": (xformers_call(f(2, 5, 2), query=f(2, 5, 6, 8, dtype=FLOAT8)), ["dtype=torch.float8_e4m3fn"]),
    "integers": (xformers_call(f(2, 5, 2), query=f(2, 5, 6, 8, dtype=INT)), ["dtype=torch.int32"]),
    "width": (xformers_call(f(2, 5, 2), query=f(2, 5, 6, 0)), ["< 1"]),
    "scale": (xformers_call(f(2, 5, 2), scale=math.nan), ["scale must be a finite number, got nan"]),
    "lengths": (
        xformers_call(f(1, 5, 2), query=f(1, 4, 6, 8), other=f(1, 5, 6, 8), cu_seqlens=torch.tensor([0, 5], dtype=INT)),
        ["cu_seqlens of the queries must rise from 0 to 4, got [0, 5]"],
    ),
    "dropout, length and scale": (
        xformers_call(f(2, 4, 2), p=0.5, scale=math.inf),
        ["dropout > 0.0", "scores has length 4", "scale must be a finite number"],
    ),
    "dropout and heads in 5-D": (
        xformers_call(f(2, 5, 4), query=f(2, 5, 2, 3, 8), p=0.5),
        ["dropout > 0.0", "scores have 4 heads, query has 2 head groups"],
    ),
}


@pytest.mark.parametrize("needs_gradient", [False, True])
@pytest.mark.parametrize("name", BAD_FOR_OPERATORS)
def test_refused_by_the_operators(name: str, needs_gradient: bool, device: torch.device) -> None:
    (inputs, options), fragments = BAD_FOR_OPERATORS[name]
    if device.type != "cpu" and name == "lengths":
        pytest.skip("contents are not looked at there")
    query, key, value, bias = moved_call(inputs, device)
    forward_op, backward_op = BY_HAND[device.type]
    if needs_gradient and query.dtype.is_floating_point:
        query = query.clone().requires_grad_()
    fragments = [*said(fragments, device), f"shape={tuple(query.shape)}", f"shape={tuple(key.shape)}"]
    inputs = (query, key, value, bias)
    call = xops.memory_efficient_attention
    message = refusal(call, NotImplementedError, fragments, *inputs, **options)
    asked = [op.NAME for op in FORWARD_OPERATORS if query.device.type in op.SUPPORTED_DEVICES]
    if query.device.type == "meta":
        asked = [op.NAME for op in FORWARD_OPERATORS]
    assert re.findall("`(.*)` is not supported because", message) == asked, "only our operators can run our bias"
    refusal(call, ValueError, [*fragments, forward_op.NAME], *inputs, **options, op=(forward_op, backward_op))
    if options["p"] == 0:
        forward, scale = xops.memory_efficient_attention_forward, options["scale"]
        refusal(forward, NotImplementedError, fragments, *inputs, scale=scale)
        refusal(forward, ValueError, fragments, *inputs, scale=scale, op=forward_op)


# Refused by xFormers itself, before any operator sees them.
BAD_FOR_XFORMERS: dict[str, tuple[tuple[tuple, Arguments], list[str]]] = {
    "3-D": (xformers_call(f(2, 5, 2), query=f(2, 5, 8)), ["BMHK format", "SparseKBias"]),
    "2-D": (xformers_call(f(2, 5, 2), query=f(5, 8)), ["[5, 8]"]),
    "heads of key": (xformers_call(f(2, 5, 2), other=f(2, 5, 2, 8)), ["[2, 5, 6, 8]", "[2, 5, 2, 8]"]),
    "dtypes": (xformers_call(f(2, 5, 2), other=f(2, 5, 6, 8, dtype=torch.float16)), ["torch.float16", "torch.float32"]),
    "devices": (xformers_call(f(2, 5, 2), other=f(2, 5, 6, 8, device="meta")), ["same device"]),
    "dropout": (xformers_call(f(2, 5, 2), p=2.0), ["p=2.0"]),
    "NaN": (xformers_call(f(2, 5, 2) * math.nan), ["scores contain NaN", "shape=(2, 5, 2)"]),
}


@pytest.mark.parametrize("by_hand", [False, True], ids=["op=None", "op by hand"])
@pytest.mark.parametrize("name", BAD_FOR_XFORMERS)
def test_refused_by_xformers_itself(name: str, by_hand: bool, device: torch.device) -> None:
    (inputs, options), fragments = BAD_FOR_XFORMERS[name]
    if device.type != "cpu" and name == "NaN":
        pytest.skip("contents are not looked at there")
    inputs, op = moved_call(inputs, device), BY_HAND[device.type] if by_hand else None
    refusal(xops.memory_efficient_attention, ValueError, fragments, *inputs, **options, op=op)
    inputs[3].scores.requires_grad_()
    refusal(xops.memory_efficient_attention, ValueError, fragments, *inputs, **options, op=op)


def test_gradients_that_do_not_fit(device: torch.device) -> None:
    """What a caller of the backward entry point can confuse."""
    query = torch.randn(2, 5, 6, 8, device=device)
    bias = SparseKBias(torch.randn(2, 5, 2, device=device), 2)
    out, lse = xops.memory_efficient_attention_forward_requires_grad(query, query, query, bias)
    for bad_grad, bad_out, bad_lse in [
        (out[:, :4], out, lse),
        (out, out[..., :4], lse),
        (out, out, lse[:, :5]),
        (out, out, lse.double()),
        (out.int(), out, lse),
        (out.flatten(2), out, lse),
    ]:
        with pytest.raises((ValueError, RuntimeError)):
            xops.memory_efficient_attention_backward(bad_grad, bad_out, bad_lse, query, query, query, bias)
