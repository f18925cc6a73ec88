"""Gradients against the dense reference, and laws that they obey by themselves."""

from __future__ import annotations

import dataclasses

import pytest
import tally
import torch
from reference import GRADS, Reference, operator
from strategies import BF16, CONTINUOUS, F16, F32, F64, Problem, law, problems

from xformers_sparsek import sparsek_attention


@law(1.5, drawn=problems(dtypes=(F64, F32)))
def test_gradients_are_exact(drawn, device):
    inputs = drawn.inputs(device)
    Reference(drawn, inputs).check(operator(drawn, inputs), GRADS)


@law(1, drawn=problems(dtypes=(BF16, F16)))
def test_gradients_in_16_bit(drawn, device):
    inputs = drawn.inputs(device)
    Reference(drawn, inputs).check(operator(drawn, inputs), GRADS)


@law(1, drawn=problems(dtypes=(F64,), kinds=(*CONTINUOUS, "some excluded", "some pinned"), spreads=(1.0, 4.0)))
def test_score_gradients_of_continuous_scores(drawn, device):
    """Nothing but rounding may differ here: float64 scores from a density sit on no kink."""
    drawn = dataclasses.replace(drawn, score_dtype=F64)
    inputs = drawn.inputs(device)
    reference = Reference(drawn, inputs)
    assert not reference.kinked.any()
    got = operator(drawn, inputs)
    reference.check(got, ("dscores",))
    if reference.exact["dscores"].any():
        tally.checked("scores with gradients")


@law(1, drawn=problems(dtypes=(F64, F32)))
def test_score_gradients_sum_to_zero(drawn, device):
    """A shift of all scores changes no gate: so for each (batch, group, sequence)."""
    drawn = dataclasses.replace(drawn, score_dtype=drawn.dtype)
    inputs = drawn.inputs(device)
    grad = operator(drawn, inputs)["dscores"]
    pinned_or_excluded = ~inputs.scores.isfinite()
    assert (grad[pinned_or_excluded] == 0).all()
    reference = Reference(drawn, inputs)
    # What is left of sums that cancel is off by what they were: elements may be off by more than their own rounding.
    error = reference.error_of("dscores")
    for _, keys in reference.pattern.slices(drawn):
        part = grad[:, keys].double()
        bound = error[:, keys].sum(1) + torch.finfo(drawn.dtype).eps * part.abs().sum(1)
        assert (part.sum(1).abs() <= bound).all()
        if part.any():
            tally.checked("sum")


@law(0.5, drawn=problems(dtypes=(F64, F32)))
def test_unseen_keys_and_blind_queries_get_no_gradient(drawn, device):
    """Gradients of exactly 0, for keys that no query sees and queries that see no key."""
    inputs = drawn.inputs(device)
    visible = Reference(drawn, inputs).gates > 0
    got = operator(drawn, inputs)
    unseen = ~visible.any(-2).transpose(1, 2)  # [B, Mk, G]
    blind = ~visible.any(-1).transpose(1, 2).repeat_interleave(drawn.ratio, 2)  # [B, Mq, H]
    for name, rows in (("dk", unseen), ("dv", unseen), ("dq", blind)):
        assert (got[name][rows] == 0).all()
        if rows.any():
            tally.checked(name)


@law(0.5, drawn=problems(dtypes=(F64, F32), sizes=("tiny", "small", "medium")))
def test_gradients_of_lse_alone(drawn, device):
    drawn = dataclasses.replace(drawn, lse_grad=True)
    inputs = drawn.inputs(device)
    leaves = [x.detach().requires_grad_() for x in (inputs.query, inputs.key, inputs.value, inputs.scores)]
    _, lse = sparsek_attention(*leaves, drawn.num_keys, cu_seqlens=inputs.cu_seqlens, return_lse=True, **drawn.options)
    grads = torch.autograd.grad(lse, leaves, inputs.grad_lse, materialize_grads=True)
    only_lse = dataclasses.replace(inputs, grad_out=torch.zeros_like(inputs.grad_out))
    Reference(drawn, only_lse).check(dict(zip(GRADS, grads, strict=True)), GRADS)
    assert (grads[2] == 0).all()


def small_problem(**changes) -> Problem:
    base = Problem(
        lengths=((7, 9),), packed=False, batch=2, groups=2, ratio=1, width=3, value_width=2, dtype=F64,
        score_dtype=F64, kind="normal", spread=1.0, num_keys=3, window=0, causal=True, hard=False, scale=None,
        sharpness=1.0, layouts=("contiguous",) * 5, lse_grad=False, seed=0,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"causal": False},
        {"window": 2, "num_keys": 2},
        {"groups": 1, "ratio": 3, "batch": 1},
        {"lengths": ((3, 4), (0, 2), (5, 3), (2, 5)), "packed": True, "batch": 1, "num_keys": 2},
        {"kind": "some pinned", "seed": 3},
        {"kind": "some excluded", "scale": 0.7},
    ],
    ids=str,
)
def test_gradcheck(changes, device):
    problem = small_problem(**changes)
    inputs = problem.inputs(device)
    reference = Reference(problem, inputs)
    # Finite differences need room: no gate may reach 0 or 1 within a step.
    assert reference.room() > 1e-4, "choose another seed"
    assert reference.fractional.any()
    finite = inputs.scores.isfinite()

    def attention(query, key, value, scores):
        scores = torch.where(finite, scores, inputs.scores)
        out, lse = sparsek_attention(
            query, key, value, scores, problem.num_keys, cu_seqlens=inputs.cu_seqlens, return_lse=True,
            **problem.options,
        )  # fmt: skip
        return out, torch.where(lse == -torch.inf, 0.0, lse)

    start = [inputs.query, inputs.key, inputs.value, torch.where(finite, inputs.scores, 0.0)]
    assert torch.autograd.gradcheck(attention, [x.clone().requires_grad_() for x in start])


def test_a_kink_belongs_to_neither_side(device):
    """The Jacobian is that of the gates strictly between 0 and 1, also where another is exactly 0 or 1."""
    at_0, at_1 = ([2.5, 2.5, 2.0], [True, True, False]), ([2.0, 1.5, 1.5, 0.0], [False, True, True, False])
    for scores, fractional in (at_0, at_1):
        u = torch.tensor(scores, dtype=F64, device=device).view(1, -1, 1).requires_grad_()
        gen = torch.Generator().manual_seed(0)
        n = len(scores)
        q, k, v = (torch.randn(1, n, 1, 4, generator=gen, dtype=F64).to(device) for _ in range(3))
        num_keys = 1 if n == 3 else 2
        out = sparsek_attention(q[:, :1], k, v, u, num_keys, causal=False)
        (grad,) = torch.autograd.grad(out.square().sum(), u)
        grad = grad.flatten()
        assert ((grad != 0) == torch.tensor(fractional, device=device)).all()
        assert abs(grad.sum()) < 1e-14


@pytest.mark.parametrize("needs", ["query", "key", "value", "scores"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_any_one_input_may_need_gradients(needs, dtype, device):
    problem = small_problem(dtype=dtype, score_dtype=F32)
    inputs = problem.inputs(device)
    everything = operator(problem, inputs)
    tensors = {name: getattr(inputs, name).clone() for name in ("query", "key", "value", "scores")}
    tensors[needs].requires_grad_()
    out = sparsek_attention(**tensors, num_keys=problem.num_keys)
    (grad,) = torch.autograd.grad(out, tensors[needs], inputs.grad_out)
    assert torch.equal(grad, everything["dscores" if needs == "scores" else f"d{needs[0]}"])


def test_no_second_derivative(device):
    problem = small_problem()
    inputs = problem.inputs(device)
    query = inputs.query.clone().requires_grad_()
    out = sparsek_attention(query, inputs.key, inputs.value, inputs.scores, problem.num_keys)
    (grad,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        grad.sum().backward()
