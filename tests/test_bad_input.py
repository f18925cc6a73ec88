"""Every bad input gives one exception that names all reasons and shows the shapes; nothing crashes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import xformers.ops as xops
from torch import Tensor

from xformers_sparsek import SparseKBias, SparseKScorer, sparsek, sparsek_attention
from xformers_sparsek.xformers_ops import BwOp, FwOp

Arguments = dict[str, Any]


def good() -> Arguments:
    """Arguments of ``sparsek_attention`` that it accepts; every bad input differs from them in what it names."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"query": (2, 6, 4, 8), "key": (2, 7, 2, 8), "value": (2, 7, 2, 5), "scores": (2, 7, 2)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**tensors, "num_keys": 3}


def packed(*ends: int | list[int], queries: int = 6, keys: int = 6) -> Arguments:
    """One batch entry of packed sequences with these cumulative lengths (or one list each for queries and keys)."""
    lengths = [torch.tensor(e, dtype=torch.int32) for e in (ends if isinstance(ends[0], list) else [list(ends)])]
    tensors = {"query": torch.zeros(1, queries, 4, 8), "key": torch.zeros(1, keys, 2, 8)}
    tensors |= {"value": torch.zeros(1, keys, 2, 5), "scores": torch.zeros(1, keys, 2)}
    return {**tensors, "cu_seqlens": lengths[0] if len(lengths) == 1 else tuple(lengths)}


def f(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, device=device).to(dtype)


NAN_SCORES = f(2, 7, 2).index_put((torch.tensor(1), torch.tensor(2), torch.tensor(0)), torch.tensor(math.nan))
INT, FLOAT8, COMPLEX = torch.int32, torch.float8_e4m3fn, torch.complex64

# What is bad about the arguments of sparsek_attention, and what the message must say about it.
BAD_ATTENTION: dict[str, tuple[Arguments, list[str]]] = {
    # shapes
    "3-D query": ({"query": f(2, 6, 8)}, ["query must have 4 dimensions", "(2, 6, 8)"]),
    "5-D key": ({"key": f(2, 7, 2, 1, 8)}, ["key must have 4 dimensions", "(2, 7, 2, 1, 8)"]),
    "2-D value": ({"value": f(7, 5)}, ["value must have 4 dimensions", "(7, 5)"]),
    "scalar query": ({"query": f()}, ["query must have 4 dimensions"]),
    "2-D scores": ({"scores": f(2, 7)}, ["scores must have shape [B, Mk, G]", "(2, 7)"]),
    "4-D scores": ({"scores": f(2, 7, 2, 1)}, ["scores must have shape [B, Mk, G]"]),
    "all 3-D": (
        {"query": f(2, 6, 8), "key": f(2, 7, 8), "value": f(2, 7, 8)},
        ["query must have 4", "key must have 4", "value must have 4"],
    ),
    "batch of key": ({"key": f(3, 7, 2, 8)}, ["key has batch size 3, query has 2"]),
    "batch of value": ({"value": f(1, 7, 2, 5)}, ["value has batch size 1, query has 2"]),
    "batch of scores": ({"scores": f(1, 7, 2)}, ["scores has batch size 1, query has 2"]),
    "length of value": ({"value": f(2, 8, 2, 5)}, ["value has length 8, key has 7"]),
    "length of scores": ({"scores": f(2, 6, 2)}, ["scores has length 6, key has 7"]),
    "heads of value": ({"value": f(2, 7, 4, 5)}, ["value has 4 heads, key has 2"]),
    "heads of scores": ({"scores": f(2, 7, 4)}, ["scores has 4 heads, key has 2"]),
    "heads are no multiple": ({"query": f(2, 6, 3, 8)}, ["query has 3 heads, not a multiple of the 2 heads of key"]),
    "fewer heads than groups": ({"query": f(2, 6, 1, 8)}, ["query has 1 heads, not a multiple"]),
    "no query heads": ({"query": f(2, 6, 0, 8)}, ["query has 0 heads"]),
    "no key heads": ({"key": f(2, 7, 0, 8), "value": f(2, 7, 0, 5), "scores": f(2, 7, 0)}, ["key has 0"]),
    "width of key": ({"key": f(2, 7, 2, 16)}, ["key has width 16, query has 8"]),
    "no width": ({"query": f(2, 6, 4, 0), "key": f(2, 7, 2, 0)}, ["query has width 0"]),
    "no value width": ({"value": f(2, 7, 2, 0)}, ["value has 0"]),
    # types
    "query is a list": ({"query": [1.0]}, ["query must be a tensor, got list"]),
    "no key": ({"key": None}, ["key must be a tensor, got NoneType"]),
    "no scores": ({"scores": None}, ["scores must be a tensor", "NoneType"]),
    "integer tensors": (
        {"query": f(2, 6, 4, 8, dtype=INT), "key": f(2, 7, 2, 8, dtype=INT), "value": f(2, 7, 2, 5, dtype=INT)},
        ["query has dtype torch.int32", "supported: float64, float32, bfloat16, float16"],
    ),
    "float8 tensors": (
        {
            "query": f(2, 6, 4, 8, dtype=FLOAT8),
            "key": f(2, 7, 2, 8, dtype=FLOAT8),
            "value": f(2, 7, 2, 5, dtype=FLOAT8),
        },
        ["query has dtype torch.float8_e4m3fn"],
    ),
    "complex query": ({"query": f(2, 6, 4, 8, dtype=COMPLEX)}, ["query has dtype torch.complex64", "key has dtype"]),
    "boolean scores": ({"scores": f(2, 7, 2, dtype=torch.bool)}, ["scores have dtype torch.bool"]),
    "float8 scores": ({"scores": f(2, 7, 2, dtype=FLOAT8)}, ["scores have dtype torch.float8_e4m3fn"]),
    "bfloat16 key": ({"key": f(2, 7, 2, 8, dtype=torch.bfloat16)}, ["key has dtype torch.bfloat16, query has"]),
    "float64 value": ({"value": f(2, 7, 2, 5, dtype=torch.float64)}, ["value has dtype torch.float64, query has"]),
    "float64 scores": (
        {"scores": f(2, 7, 2, dtype=torch.float64)},
        ["scores are float64 but query is", "scores.float()"],
    ),
    "sparse key": ({"key": f(2, 7, 2, 8).to_sparse()}, ["key must be a dense tensor, got torch.sparse_coo"]),
    "sparse scores": ({"scores": f(2, 7, 2).to_sparse()}, ["scores must be a dense tensor, got torch.sparse_coo"]),
    "nested query": (
        {"query": torch.nested.nested_tensor([f(6, 4, 8), f(5, 4, 8)], layout=torch.jagged)},
        ["query must be a dense tensor, got a nested one"],
    ),
    # devices
    "key elsewhere": ({"key": f(2, 7, 2, 8, device="meta")}, ["key is on meta, query on cpu"]),
    "scores elsewhere": ({"scores": f(2, 7, 2, device="meta")}, ["scores is on meta, query on cpu"]),
    "query elsewhere": ({"query": f(2, 6, 4, 8, device="meta")}, ["key is on cpu, query on meta", "value is on cpu"]),
    # options
    "k = 0": ({"num_keys": 0}, ["k must be at least 1, got 0"]),
    "negative k": ({"num_keys": -5}, ["k must be at least 1, got -5"]),
    "fractional k": ({"num_keys": 2.0}, ["k must be an integer, got 2.0"]),
    "boolean k": ({"num_keys": True}, ["k must be an integer, got True"]),
    "k is a word": ({"num_keys": "many"}, ["k must be an integer, got 'many'"]),
    "k is a tensor": ({"num_keys": torch.tensor(3)}, ["k must be an integer"]),
    "negative window": ({"window": -1}, ["window must be at least 0, got -1"]),
    "fractional window": ({"window": 0.5}, ["window must be an integer, got 0.5"]),
    "no window": ({"window": None}, ["window must be an integer, got None"]),
    "window without causal": ({"window": 2, "causal": False}, ["window needs causal=True"]),
    "scale is a word": ({"scale": "big"}, ["scale must be a finite number, got 'big'"]),
    "NaN scale": ({"scale": math.nan}, ["scale must be a finite number, got nan"]),
    "huge scale": ({"scale": 10**400}, ["scale must be a finite number, got 10000"]),
    "k beyond 64 bits": ({"num_keys": 2**70}, ["k must be at most"]),
    "causal is a word": ({"causal": "no"}, ["causal must be True or False, got 'no'"]),
    "neither hard nor soft": ({"hard": None}, ["hard must be True or False, got None"]),
    "infinite scale": ({"scale": -math.inf}, ["scale must be a finite number, got -inf"]),
    "NaN scores": ({"scores": NAN_SCORES}, ["scores contain NaN"]),
    # packed sequences
    "int64 lengths": (packed(0, 6) | {"cu_seqlens": torch.tensor([0, 6])}, ["must be int32", "torch.int64"]),
    "2-D lengths": (packed(0, 6) | {"cu_seqlens": f(1, 2, dtype=INT)}, ["of shape [sequences + 1]", "(1, 2)"]),
    "empty lengths": (packed(0, 6) | {"cu_seqlens": f(0, dtype=INT)}, ["of shape [sequences + 1]", "(0,)"]),
    "lengths are numbers": (packed(0, 6) | {"cu_seqlens": (0, 6)}, ["must be an int32 tensor, got int"]),
    "lengths elsewhere": (
        packed(0, 6) | {"cu_seqlens": f(2, dtype=INT, device="meta")},
        ["are on meta, scores on cpu"],
    ),
    "an array of lengths": (
        packed(0, 6) | {"cu_seqlens": numpy.array([0, 6])},
        ["must be an int32 tensor, got ndarray"],
    ),
    "three length tensors": (
        packed([0, 6], [0, 6], [0, 6]),
        ["cu_seqlens of the queries must be an int32 tensor, got tuple"],
    ),
    "lengths of keys missing": (
        packed(0, 6) | {"cu_seqlens": (torch.tensor([0, 6], dtype=INT), None)},
        ["cu_seqlens must be given for queries and keys"],
    ),
    "lengths start late": (packed(1, 6), ["cu_seqlens of the keys must rise from 0 to 6, got [1, 6]"]),
    "lengths fall": (packed(0, 4, 2, 6), ["must rise from 0 to 6, got [0, 4, 2, 6]"]),
    "lengths end early": (packed(0, 3, 5), ["must rise from 0 to 6, got [0, 3, 5]"]),
    "lengths end late": (packed([0, 9], [0, 6]), ["cu_seqlens of the queries must rise from 0 to 6, got [0, 9]"]),
    "other number of sequences": (packed([0, 6], [0, 3, 6]), ["1 sequences of queries and 2 of keys"]),
    "packed batch": ({"cu_seqlens": torch.tensor([0, 6], dtype=INT)}, ["packed sequences need batch size 1"]),
    # several at once
    "k, window and scale": (
        {"num_keys": 0, "window": -1, "scale": math.inf},
        ["k must be at least 1", "window must be at least 0", "scale must be a finite number"],
    ),
    "shape and dtype": (
        {"key": f(2, 7, 3, 16, dtype=torch.float16), "window": 1, "causal": False},
        ["key has width 16", "key has dtype", "value has 2 heads, key has 3", "not a multiple", "window needs causal"],
    ),
    "shape and device": (
        {"scores": f(3, 9, 2, device="meta"), "num_keys": "x"},
        ["scores has batch size 3", "scores has length 9", "scores is on meta", "k must be an integer"],
    ),
    "lengths and batch": (
        {"cu_seqlens": torch.tensor([0, 6]), "num_keys": -1},
        ["packed sequences need batch size 1", "must be int32", "k must be at least 1"],
    ),
}


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


def show(arguments: Arguments) -> list[str]:
    return [f"shape={tuple(x.shape)}" for x in arguments.values() if isinstance(x, Tensor) and not x.is_nested]


def test_the_good_input_is_accepted() -> None:
    for changes in ({}, packed(0, 2, 6), packed([0, 5], [0, 6], queries=5), {"num_keys": 2**40, "window": 2**40}):
        out, lse = sparsek_attention(**(good() | changes), return_lse=True)
        assert torch.isfinite(out).all()
        assert torch.isfinite(lse).all()


@pytest.mark.parametrize("name", BAD_ATTENTION)
def test_attention(name: str) -> None:
    changes, fragments = BAD_ATTENTION[name]
    arguments = good() | changes
    message = refusal(sparsek_attention, ValueError, [*fragments, *show(arguments)], **arguments)
    assert message.count("because:") == 1
    reasons = message.partition("because:\n")[2].splitlines()
    assert len(reasons) == len(set(reasons))


@pytest.mark.parametrize("name", [n for n, (changes, _) in BAD_ATTENTION.items() if "cu_seqlens" in changes])
def test_packed_bias(name: str) -> None:
    """The same lengths are refused where a bias is made, except what only the queries show."""
    changes, fragments = BAD_ATTENTION[name]
    arguments = good() | changes
    if name == "lengths end late":
        return
    refusal(
        SparseKBias,
        ValueError,
        [*fragments, *show({"scores": arguments["scores"]})],
        arguments["scores"],
        arguments["num_keys"],
        cu_seqlens=arguments["cu_seqlens"],
    )


BAD_CALLS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "bias: k and window": (
        lambda: SparseKBias(f(1, 4, 2), 0, -2),
        ["k must be at least 1", "window must be at least 0"],
    ),
    "bias: window": (lambda: SparseKBias(f(1, 4, 2), 2, 3, causal=False), ["window needs causal=True", "(1, 4, 2)"]),
    "bias: scores": (lambda: SparseKBias(f(4, 2, dtype=INT), 2), ["[B, Mk, G], got (4, 2)", "dtype torch.int32"]),
    "bias: no tensor": (lambda: SparseKBias([1.0], 2), ["scores must be a tensor [B, Mk, G], got list"]),
    "bias: lengths": (lambda: SparseKBias.from_seqlens(f(1, 4, 2), 2, [2, 3]), ["rise from 0 to 4, got [0, 2, 5]"]),
    "bias: negative length": (
        lambda: SparseKBias.from_seqlens(f(1, 4, 2), 2, [6, -2]),
        ["rise from 0 to 4, got [0, 6, 4]"],
    ),
    "dense: batch": (lambda: SparseKBias(f(1, 4, 2), 2).materialize((2, 2, 4, 4)), ["(1, 4, 2)", "(2, 2, 4, 4)"]),
    "dense: heads": (lambda: SparseKBias(f(1, 4, 2), 2).materialize((1, 3, 4, 4)), ["(1, 4, 2)", "(1, 3, 4, 4)"]),
    "dense: 3-D": (lambda: SparseKBias(f(1, 4, 2), 2).materialize((2, 4, 4)), ["(1, 4, 2)", "(2, 4, 4)"]),
    "sparsek: k": (lambda: sparsek(f(3), 0), ["k must be at least 1, got 0"]),
    "sparsek: k and scores": (lambda: sparsek(f(3, dtype=INT), 1.5), ["k must be an integer, got 1.5", "torch.int32"]),
    "sparsek: scalar": (lambda: sparsek(f(), 1), ["at least one dimension"]),
    "sparsek: no tensor": (lambda: sparsek([1.0, 2.0], 1), ["must be a floating-point tensor", "list"]),
    "scorer: sizes": (lambda: SparseKScorer(0, -1), ["dim=0", "num_groups=-1"]),
    "scorer: spread": (lambda: SparseKScorer(4, 1, spread=0.0, slope_length=0), ["spread=0.0", "slope_length=0"]),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_other_functions(name: str) -> None:
    function, fragments = BAD_CALLS[name]
    refusal(function, ValueError, fragments)


# ----------------------------------------------------------------------------------------------------- through xFormers


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
def test_xformers_operators(name: str, needs_gradient: bool) -> None:
    ((query, key, value, bias), options), fragments = BAD_FOR_OPERATORS[name]
    if needs_gradient and query.dtype.is_floating_point:
        query = query.clone().requires_grad_()
    fragments = [*fragments, f"shape={tuple(query.shape)}", f"shape={tuple(key.shape)}"]
    inputs = (query, key, value, bias)
    call = xops.memory_efficient_attention
    message = refusal(call, NotImplementedError, [*fragments, FwOp.NAME], *inputs, **options)
    assert message.count("is not supported because") == 1, "only our operator can run our bias"
    refusal(call, ValueError, [*fragments, FwOp.NAME], *inputs, **options, op=(FwOp, BwOp))
    if options["p"] == 0:
        forward, scale = xops.memory_efficient_attention_forward, options["scale"]
        refusal(forward, NotImplementedError, fragments, *inputs, scale=scale)
        refusal(forward, ValueError, fragments, *inputs, scale=scale, op=FwOp)


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


@pytest.mark.parametrize("op", [None, (FwOp, BwOp)], ids=["op=None", "op=(FwOp, BwOp)"])
@pytest.mark.parametrize("name", BAD_FOR_XFORMERS)
def test_xformers_itself(name: str, op: tuple | None) -> None:
    (inputs, options), fragments = BAD_FOR_XFORMERS[name]
    refusal(xops.memory_efficient_attention, ValueError, fragments, *inputs, **options, op=op)
    inputs[3].scores.requires_grad_()
    refusal(xops.memory_efficient_attention, ValueError, fragments, *inputs, **options, op=op)


def test_xformers_gradients_that_do_not_fit() -> None:
    """What a caller of the backward entry point can confuse."""
    query = torch.randn(2, 5, 6, 8)
    bias = SparseKBias(torch.randn(2, 5, 2), 2)
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
