"""The operators inside PyTorch: opcheck, checkpointing, torch.compile."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from reference import QUANTITIES, operator
from strategies import BF16, F32, F64, Inputs, Problem
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from xformers_sparsek import sparsek_attention

BASE = Problem(
    lengths=((40, 50),), packed=False, batch=2, groups=2, ratio=2, width=8, value_width=6, dtype=F32, score_dtype=F32,
    kind="normal", spread=4.0, num_keys=5, window=3, causal=True, hard=False, scale=None, sharpness=1.0,
    layouts=("transposed", "fused", "strided", "transposed", "contiguous"), lse_grad=True, seed=0,
)  # fmt: skip
CASES = {
    "causal": BASE,
    "not causal, bf16": dataclasses.replace(BASE, causal=False, window=0, dtype=BF16, lse_grad=False),
    "packed, hard, f64": dataclasses.replace(
        BASE, lengths=((9, 12), (0, 3), (30, 30)), packed=True, batch=1, hard=True, dtype=F64, score_dtype=F64
    ),
    "without keys": dataclasses.replace(BASE, lengths=((20, 9),), kind="all excluded", window=0),
}
EVERY_CASE = pytest.mark.parametrize("problem", CASES.values(), ids=CASES.keys())


def leaves_of(inputs: Inputs) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in (inputs.query, inputs.key, inputs.value, inputs.scores)]


def arguments(problem: Problem, inputs: Inputs) -> dict[str, tuple]:
    """What each operator takes, in order."""
    lengths = inputs.cu_seqlens or (None, None)
    query, key, value, scores = leaves_of(inputs)
    select = (
        scores.detach(),
        *lengths,
        problem.queries,
        problem.num_keys,
        problem.window,
        problem.causal,
        problem.hard,
    )
    pattern = torch.ops.xformers_sparsek.select(*select)
    options = (*lengths, problem.window, problem.causal, problem.hard, problem.factor)
    forward = (query, key, value, scores, *pattern, *options, None)
    out, lse = (x.detach() for x in torch.ops.xformers_sparsek.forward(*forward))
    tensors = (x.detach() for x in (query, key, value, scores))
    backward = (inputs.grad_out, inputs.grad_lse, *tensors, out, lse, *pattern, *options)
    return {"select": select, "forward": forward, "backward": backward}


@EVERY_CASE
@pytest.mark.parametrize("name", ["select", "forward", "backward"])
def test_opcheck(name, problem, device):
    inputs = problem.inputs(device)
    op = getattr(torch.ops.xformers_sparsek, name).default
    outcome = torch.library.opcheck(op, arguments(problem, inputs)[name])
    assert set(outcome.values()) == {"SUCCESS"}


@EVERY_CASE
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(problem, use_reentrant, device):
    inputs = problem.inputs(device)
    expected = operator(problem, inputs)
    leaves = leaves_of(inputs)

    def attention(*tensors):
        return sparsek_attention(
            *tensors, problem.num_keys, cu_seqlens=inputs.cu_seqlens, return_lse=True, **problem.options
        )

    out, lse = checkpoint(attention, *leaves, use_reentrant=use_reentrant)
    (out.double() * inputs.grad_out).sum().backward(retain_graph=problem.lse_grad)
    if problem.lse_grad:
        torch.where(lse > -torch.inf, lse, 0.0).mul(inputs.grad_lse).sum().backward()
    for name, leaf in zip(QUANTITIES[2:], leaves, strict=True):
        torch.testing.assert_close(leaf.grad, expected[name])


@EVERY_CASE
def test_compiled_equals_eager(problem, device):
    inputs = problem.inputs(device)
    leaves = leaves_of(inputs)

    def attention(query, key, value, scores, cu_seqlens):
        # Arithmetic on both sides gives the compiler something to fuse with.
        out, lse = sparsek_attention(
            query * 1.5, key, value, scores + 0.5, problem.num_keys, cu_seqlens=cu_seqlens, return_lse=True,
            **problem.options,
        )  # fmt: skip
        return out.tanh(), lse

    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True)
    results = []
    for function in (attention, compiled):
        out, lse = function(*leaves, inputs.cu_seqlens)
        grads = torch.autograd.grad(out, leaves, inputs.grad_out)
        results.append((out, lse, *grads))
    # Eager 16-bit code rounds after every operation, and compiled code where it likes.
    bounds = {"rtol": 2**-6, "atol": 2**-6} if problem.dtype.itemsize == 2 else {"rtol": None, "atol": None}
    for name, eager, other in zip(QUANTITIES, *results, strict=True):
        torch.testing.assert_close(other, eager, **bounds, msg=lambda text, name=name: f"{name}: {text}")


def test_compiled_with_changing_lengths(device):
    """One graph serves other lengths without tracing anew for each."""
    torch._dynamo.reset()
    frames = []

    def backend(graph, _):
        frames.append(graph)
        return graph.forward

    compiled = torch.compile(sparsek_attention, fullgraph=True, dynamic=True, backend=backend)
    for length in (33, 57, 90):
        problem = dataclasses.replace(BASE, lengths=((length, length),))
        x = problem.inputs(device)
        expected = sparsek_attention(x.query, x.key, x.value, x.scores, 5, window=3)
        assert torch.equal(compiled(x.query, x.key, x.value, x.scores, 5, window=3), expected)
    assert len(frames) == 1
