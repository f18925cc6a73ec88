"""The operator ``select``: thresholds and expiries against the dense gates and exact arithmetic."""

from __future__ import annotations

import dataclasses
import math

import pytest
import tally
import torch
from hypothesis import strategies as st
from reference import Pattern, Reference, exact_gates
from strategies import BF16, F32, F64, Inputs, Problem, law, problems

NEVER = 2**31 - 1
INF = float("inf")


def select(problem: Problem, inputs: Inputs, scores: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    scores = inputs.scores if scores is None else scores
    return torch.ops.xformers_sparsek.select(
        scores,
        *(inputs.cu_seqlens or (None, None)),
        problem.queries,
        problem.num_keys,
        problem.window,
        problem.causal,
        problem.hard,
    )


def seen(problem: Problem, pattern: Pattern, expiry: torch.Tensor) -> torch.Tensor:
    """Which query sees which key ``[B, G, Mq, Mk]``, by the expiries."""
    row, key = pattern.position.unsqueeze(-1), pattern.index
    same = pattern.row_sequence.unsqueeze(-1) == pattern.key_sequence
    if not problem.causal:
        assert ((expiry == NEVER) | (expiry == 0)).all()
        return same & (expiry == NEVER).unsqueeze(-2)
    return same & (key <= row) & (row < expiry.unsqueeze(-2))


@law(2, drawn=problems())
def test_form_and_order(drawn, device):
    """Dtypes, shapes, thresholds that never fall along a sequence, expiries that leave each key its window."""
    inputs = drawn.inputs(device)
    threshold, expiry = select(drawn, inputs)
    assert threshold.shape == (drawn.batch, drawn.groups, drawn.queries)
    assert threshold.dtype == (F64 if drawn.score_dtype == F64 else F32)
    assert expiry.shape == (drawn.batch, drawn.groups, drawn.keys) and expiry.dtype == torch.int32
    assert not threshold.isnan().any()
    pattern = Pattern(drawn, device)
    for rows, keys in pattern.slices(drawn):
        part = threshold[..., rows]
        assert (part[..., 1:] >= part[..., :-1]).all()
        if part.shape[-1] > 1 and (part[..., 1:] > part[..., :-1]).any():
            tally.checked("rising thresholds")
        if drawn.causal:
            assert (expiry[..., keys] >= pattern.index[keys] + drawn.window).all()
        else:
            assert (part == part[..., :1]).all()


@law(2, drawn=problems(hard=False))
def test_thresholds_give_the_gates(drawn, device):
    inputs = drawn.inputs(device)
    reference = Reference(drawn, inputs)
    threshold, _ = select(drawn, inputs)
    threshold = threshold.double().unsqueeze(-1)
    u = reference.scores.unsqueeze(-2)
    gates = (u - threshold).clamp(0, 1)[reference.competing]
    exact = reference.soft[reference.competing]
    rounding = torch.finfo(F64 if drawn.score_dtype == F64 else F32).eps
    size = torch.where(threshold.isfinite(), threshold, 0.0).abs().expand_as(reference.soft)[reference.competing]
    total = torch.where(reference.competing, u.abs(), 0.0).sum(-1, keepdim=True)
    noise = 1e-15 * (8 + total).expand_as(reference.soft)[reference.competing]
    assert (gates >= exact - noise).all()  # rounded down: no key loses weight
    assert (gates <= exact + noise + rounding * size).all()  # and by no more than a unit
    if exact.numel():
        tally.checked("gates")


@law(2, drawn=problems())
def test_expiries_are_where_gates_end(drawn, device):
    inputs = drawn.inputs(device)
    reference = Reference(drawn, inputs)
    _, expiry = select(drawn, inputs)
    visible = reference.gates > 0
    # A gate of 1e-14 that another order of summation makes 0 decides nothing; hard gates leave no such doubt.
    u = reference.scores.nan_to_num(0, 0, 0).unsqueeze(-2)
    doubtful = (u - reference.low.nan_to_num(0, 0, 0).unsqueeze(-1)).abs() <= 1e-12 * (1 + u.abs())
    doubtful = doubtful & reference.fractional if not drawn.hard else torch.zeros_like(visible)
    got = seen(drawn, reference.pattern, expiry)
    assert torch.equal(got | doubtful, visible | doubtful)
    if drawn.causal and got.numel():
        tally.checked("hard" if drawn.hard else "soft")
        # Seen on one interval: nothing that was dropped comes back.
        for rows, _ in reference.pattern.slices(drawn):
            lost = visible[..., rows, :][..., :-1, :] & ~visible[..., rows, :][..., 1:, :]
            assert (lost.sum(-2) <= 1).all()


@law(drawn=problems(sizes=("tiny",), kinds=("integers", "integers and infinities", "tied", "normal"), spreads=(1.0,)))
def test_thresholds_match_exact_arithmetic(drawn):
    """Ties and gates that are exactly 0 or 1 included, which integers are full of."""
    inputs = drawn.inputs()
    threshold, expiry = select(drawn, inputs)
    pattern = Pattern(drawn, "cpu")
    visible = seen(drawn, pattern, expiry)
    unit = torch.finfo(threshold.dtype).eps
    for b in range(drawn.batch):
        for g in range(drawn.groups):
            u = inputs.scores[b, :, g].tolist()
            for i in range(drawn.queries):
                masked = [s if c else -INF for s, c in zip(u, pattern.candidate[i].tolist(), strict=True)]
                gates, tau = exact_gates(masked, drawn.num_keys)
                if not drawn.hard:
                    expected = [m > 0 or late for m, late in zip(gates, pattern.latest[i].tolist(), strict=True)]
                    assert visible[b, g, i].tolist() == expected
                mine = threshold[b, g, i].item()
                if any(0 < m < 1 for m in gates):  # only then the threshold is one number
                    noise = 1e-15 * (1 + max(abs(s) for s in masked if math.isfinite(s)))
                    assert float(tau) - unit * abs(float(tau)) - noise <= mine <= float(tau) + noise
                    tally.checked("thresholds")


@law(0.5, drawn=problems(kinds=("normal", "integers"), packed=False), shift=st.sampled_from([-64, 1, 8]))
def test_shift_law(drawn, device, shift):
    """Adding a number to all scores of a (batch, group) adds it to the thresholds and changes no expiry."""
    inputs = drawn.inputs(device)
    # Multiples of 1/16 shift without rounding.
    scores = (inputs.scores.double() * 16).round() / 16
    threshold, expiry = select(drawn, inputs, scores)
    moved, same = select(drawn, inputs, scores + shift)
    torch.testing.assert_close(moved, threshold + shift, rtol=1e-13, atol=1e-11)
    assert torch.equal(same, expiry)


@law(0.5, drawn=problems(kinds=("normal",), spreads=(4.0,), packed=False), seed=st.integers(0, 1000))
def test_permutation_law(drawn, device, seed):
    """Keys that all queries have as candidates may come in any order."""
    (mq, mk), more = drawn.lengths[0], drawn.window if drawn.causal else 0
    drawn = dataclasses.replace(drawn, lengths=((mq, mq + mk + more),))
    inputs = drawn.inputs(device)
    scores = inputs.scores.double() + 1e-7 * torch.arange(drawn.keys, device=device).view(1, -1, 1)  # no ties
    free = max(0, drawn.keys - drawn.queries - drawn.window + 1) if drawn.causal else drawn.keys
    order = torch.arange(drawn.keys)
    order[:free] = torch.randperm(free, generator=torch.Generator().manual_seed(seed))
    order = order.to(device)
    pattern = Pattern(drawn, device)
    threshold, expiry = select(drawn, inputs, scores)
    moved, permuted = select(drawn, inputs, scores[:, order])
    torch.testing.assert_close(moved, threshold, rtol=1e-13, atol=1e-11)
    original = seen(drawn, pattern, expiry)
    assert torch.equal(seen(drawn, pattern, permuted), original[..., order])
    if free > 1:
        tally.checked("permuted keys")


@law(0.5, drawn=problems(causal=True, packed=False), fewer=st.integers(1, 300))
def test_last_queries_alone(drawn, device, fewer):
    inputs = drawn.inputs(device)
    last = min(fewer, drawn.queries)
    threshold, expiry = select(drawn, inputs)
    alone = torch.ops.xformers_sparsek.select(
        inputs.scores, None, None, last, drawn.num_keys, drawn.window, True, drawn.hard
    )
    assert torch.equal(alone[0], threshold[..., drawn.queries - last :])
    rows = torch.arange(drawn.keys - last, drawn.keys, device=device).unsqueeze(-1)
    assert torch.equal(rows < alone[1].unsqueeze(-2), rows < expiry.unsqueeze(-2))


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_nan_scores_are_refused(causal, hard):
    scores = torch.zeros(2, 5, 3)
    scores[1, 3, 2] = torch.nan
    with pytest.raises(RuntimeError, match="NaN"):
        torch.ops.xformers_sparsek.select(scores, None, None, 5, 2, 0, causal, hard)


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
def test_hand_worked_thresholds(dtype):
    """k = 1, window 1, scores 0 2 0.5 1.75: worked by hand."""
    scores = torch.tensor([0.0, 2.0, 0.5, 1.75, 9.0], dtype=dtype).view(1, 5, 1)
    threshold, expiry = torch.ops.xformers_sparsek.select(scores, None, None, 5, 1, 1, True, False)
    # Candidates: none; 0; 0 2; 0 2 .5; 0 2 .5 1.75. One candidate is kept whole, with any threshold up to u - 1.
    assert threshold[0, 0, 0] == -INF
    assert threshold[0, 0, 1] <= -1
    assert 0 <= threshold[0, 0, 2] <= 1 and 0.5 <= threshold[0, 0, 3] <= 1
    assert threshold[0, 0, 4] == (2 + 1.75 - 1) / 2
    # Key 0 goes when key 1 becomes a candidate, key 2 at once when it leaves the window.
    assert expiry.flatten().tolist() == [2, NEVER, 3, NEVER, NEVER]
    hard = torch.ops.xformers_sparsek.select(scores, None, None, 5, 1, 1, True, True)[1]
    assert hard.flatten().tolist() == [2, NEVER, 3, 4, NEVER]
