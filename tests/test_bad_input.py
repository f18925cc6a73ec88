"""Every bad input gives one exception that names all reasons and shows the shapes; nothing crashes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from refusals import COMPLEX, FLOAT8, INT, f, moved, refusal, said
from torch import Tensor

from xformers_sparsek import SparseKBias, SparseKScorer, sparsek, sparsek_attention

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


NAN_SCORES = f(2, 7, 2).index_put((torch.tensor(1), torch.tensor(2), torch.tensor(0)), torch.tensor(math.nan))

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


def show(arguments: Arguments) -> list[str]:
    return [f"shape={tuple(x.shape)}" for x in arguments.values() if isinstance(x, Tensor) and not x.is_nested]


# Found in the contents of tensors, which are looked at on the CPU only: elsewhere that would wait for the device.
FOUND_IN_CONTENTS = ["NaN scores", "lengths start late", "lengths fall", "lengths end early", "lengths end late"]


def test_the_good_input_is_accepted(device: torch.device) -> None:
    for changes in ({}, packed(0, 2, 6), packed([0, 5], [0, 6], queries=5), {"num_keys": 2**40, "window": 2**40}):
        out, lse = sparsek_attention(**moved(good() | changes, device), return_lse=True)
        assert torch.isfinite(out).all()
        assert torch.isfinite(lse).all()


@pytest.mark.parametrize("name", BAD_ATTENTION)
def test_attention(name: str, device: torch.device) -> None:
    changes, fragments = BAD_ATTENTION[name]
    arguments = moved(good() | changes, device)
    if device.type != "cpu" and name in FOUND_IN_CONTENTS:
        assert sparsek_attention(**arguments).shape == (*arguments["query"].shape[:3], 5)
        return
    fragments = said(fragments, device)
    message = refusal(sparsek_attention, ValueError, [*fragments, *show(arguments)], **arguments)
    assert message.count("because:") == 1
    reasons = message.partition("because:\n")[2].splitlines()
    assert len(reasons) == len(set(reasons))


@pytest.mark.parametrize("name", [n for n, (changes, _) in BAD_ATTENTION.items() if "cu_seqlens" in changes])
def test_packed_bias(name: str, device: torch.device) -> None:
    """The same lengths are refused where a bias is made, except what only the queries show."""
    changes, fragments = BAD_ATTENTION[name]
    arguments = moved(good() | changes, device)
    if name == "lengths end late" or (device.type != "cpu" and name in FOUND_IN_CONTENTS):
        return
    fragments = said(fragments, device)
    refusal(
        SparseKBias,
        ValueError,
        [*fragments, *show({"scores": arguments["scores"]})],
        arguments["scores"],
        arguments["num_keys"],
        cu_seqlens=arguments["cu_seqlens"],
    )


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"hard": True}, {"window": 2}], ids=str)
def test_nan_scores_stay_among_themselves(options: dict, device: torch.device) -> None:
    """On an accelerator they give NaN in their own batch entry and head, and nothing changes elsewhere."""
    arguments = moved(good() | options, device)
    poisoned = arguments | {"scores": NAN_SCORES.to(device) + arguments["scores"]}
    if device.type == "cpu":
        refusal(sparsek_attention, ValueError, ["scores contain NaN"], **poisoned)
        return
    results = []
    for case in (arguments, poisoned):
        leaves = [case[name].clone().requires_grad_() for name in ("query", "key", "value", "scores")]
        out, lse = sparsek_attention(*leaves, **{name: case[name] for name in ("num_keys", *options)}, return_lse=True)
        grads = torch.autograd.grad(out.sum() + lse.sum(), leaves)
        results.append([x.detach().unflatten(dim, (2, -1)) for x, dim in zip((out, lse, *grads), (2, 1, 2, 2, 2, 2))])
    for clean, other, dim in zip(*results, (2, 1, 2, 2, 2, 2)):
        assert other[1].select(dim - 1, 0).isnan().any()
        other[1].select(dim - 1, 0).copy_(clean[1].select(dim - 1, 0))
        torch.testing.assert_close(other, clean, rtol=0, atol=0)


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
