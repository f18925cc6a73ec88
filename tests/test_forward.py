"""Output and LSE against the dense reference and against PyTorch's own attention."""

from __future__ import annotations

import dataclasses

import pytest
import tally
import torch
import torch.nn.functional as F
from reference import Reference, operator
from strategies import BF16, DTYPES, F16, F32, F64, FINITE, Problem, law, problems

from xformers_sparsek import sparsek_attention

FORWARD = ("out", "lse")


def run_forward(problem: Problem, inputs) -> dict[str, torch.Tensor]:
    out, lse = sparsek_attention(
        inputs.query,
        inputs.key,
        inputs.value,
        inputs.scores,
        problem.num_keys,
        cu_seqlens=inputs.cu_seqlens,
        return_lse=True,
        **problem.options,
    )
    assert out.shape == (problem.batch, problem.queries, problem.heads, problem.value_width)
    assert lse.shape == (problem.batch, problem.heads, problem.queries)
    assert out.dtype == problem.dtype and lse.dtype == (F64 if problem.dtype == F64 else F32)
    return {"out": out, "lse": lse}


@law(1.5, drawn=problems(dtypes=(F64, F32)))
def test_forward_is_exact(drawn, device):
    inputs = drawn.inputs(device)
    Reference(drawn, inputs).check(run_forward(drawn, inputs), FORWARD)


@law(1, drawn=problems(dtypes=(BF16, F16)))
def test_forward_in_16_bit(drawn, device):
    inputs = drawn.inputs(device)
    Reference(drawn, inputs).check(run_forward(drawn, inputs), FORWARD)


@law(0.5, drawn=problems(dtypes=(F64, F32), kinds=("normal", "some excluded", "all excluded")))
def test_queries_without_keys(drawn, device):
    """Output 0 and LSE -inf where every gate is 0, and nowhere else."""
    inputs = drawn.inputs(device)
    reference = Reference(drawn, inputs)
    got = run_forward(drawn, inputs)
    blind = ~(reference.gates > 0).any(-1).repeat_interleave(drawn.ratio, 1)
    assert torch.equal(got["lse"] == -torch.inf, blind)
    assert (got["out"].transpose(1, 2)[blind] == 0).all()
    if blind.any():
        tally.checked("queries without keys")


def torch_attention(problem: Problem, inputs, dtype: torch.dtype = F64) -> dict[str, torch.Tensor]:
    """PyTorch's dense attention with gradients, in the layout of the operator; NaN for queries without keys."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (inputs.query, inputs.key, inputs.value)]
    q, k, v = (x.transpose(1, 2) for x in leaves)
    mask = None
    if problem.causal:
        row = torch.arange(problem.queries, device=q.device).unsqueeze(-1) + problem.keys - problem.queries
        mask = torch.arange(problem.keys, device=q.device) <= row
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=problem.scale, enable_gqa=True).transpose(1, 2)
    grads = torch.autograd.grad(out, leaves, inputs.grad_out.to(dtype))
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))


@law(1, drawn=problems(dtypes=(F64, F32), packed=False, kinds=(*FINITE, "some pinned")))
def test_selecting_everything_is_dense_attention(drawn, device):
    """k >= Mk keeps every candidate; the scores then have no say and no gradient."""
    # Every query needs a key: PyTorch has no answer for others.
    if drawn.keys == 0 or (drawn.causal and drawn.queries > drawn.keys):
        drawn = dataclasses.replace(drawn, lengths=((drawn.queries, drawn.queries + 1),))
    drawn = dataclasses.replace(drawn, num_keys=drawn.keys + drawn.num_keys, lse_grad=False)
    compare_with_torch(drawn, device)


@law(1, drawn=problems(dtypes=(F64, F32), packed=False, causal=True))
def test_window_over_everything_is_dense_attention(drawn, device):
    """window >= Mk keeps every key, whatever its score, -inf included."""
    drawn = dataclasses.replace(drawn, window=drawn.keys + drawn.window + 1, lse_grad=False)
    if drawn.queries > drawn.keys:
        drawn = dataclasses.replace(drawn, lengths=((drawn.keys, drawn.keys),))
    compare_with_torch(drawn, device)


def compare_with_torch(problem: Problem, device: torch.device) -> None:
    inputs = problem.inputs(device)
    got = operator(problem, inputs)
    reference = Reference(problem, inputs)
    expected = torch_attention(problem, inputs)
    reference.exact |= expected
    reference.check(got, ("out", "dq", "dk", "dv"))
    assert (got["dscores"] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_options_have_their_documented_defaults(dtype):
    """window=0, causal, soft, scale K ** -0.5, and the output alone."""
    gen = torch.Generator().manual_seed(1)
    q = torch.randn(2, 20, 4, 8, generator=gen).to(dtype)
    k, v = (torch.randn(2, 20, 2, 8, generator=gen).to(dtype) for _ in range(2))
    u = torch.randn(2, 20, 2, generator=gen)
    out, _ = sparsek_attention(
        q, k, v, u, 3, window=0, causal=True, hard=False, scale=8**-0.5, cu_seqlens=None, return_lse=True
    )
    plain = sparsek_attention(q, k, v, u, 3)
    assert isinstance(plain, torch.Tensor) and torch.equal(plain, out)


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("num_keys", [1, 700])
def test_every_key_leaves_on_time(num_keys, window, device):
    """With rising scores each query drops one key, so some key leaves right after every internal boundary."""
    length, width = 1500, 4
    gen = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, length, 1, width, generator=gen, dtype=F64).to(device) for _ in range(3))
    scores = 10.0 * torch.arange(length, dtype=F64, device=device).view(1, -1, 1)
    out = sparsek_attention(query, key, value, scores, num_keys, window=window, hard=True)
    index = torch.arange(length, device=device)
    age = index.unsqueeze(-1) - index
    band = (age >= 0) & (age < num_keys + window)
    dense = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)), attn_mask=band)
    torch.testing.assert_close(out, dense.transpose(1, 2), rtol=1e-12, atol=1e-12)


def test_lengths_may_be_strided(device):
    gen = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 9, 1, 4, generator=gen).to(device) for _ in range(3))
    scores = torch.randn(1, 9, 1, generator=gen).to(device)
    lengths = torch.tensor([0, 7, 4, 7, 9, 7], dtype=torch.int32, device=device)
    strided = sparsek_attention(query, key, value, scores, 2, cu_seqlens=lengths[::2])
    assert torch.equal(strided, sparsek_attention(query, key, value, scores, 2, cu_seqlens=lengths[::2].contiguous()))
