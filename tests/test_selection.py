"""The laws of the projection ``sparsek``, and of the dense bias made of it."""

from __future__ import annotations

import math

import pytest
import tally
import torch
from hypothesis import assume
from hypothesis import strategies as st
from reference import Pattern, bias_of, exact_gates
from strategies import BF16, DTYPES, F16, F32, F64, KINDS, Problem, _scores, law, problems

from xformers_sparsek import SparseKBias, sparsek

INF = float("inf")


@st.composite
def slices(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS, largest: int = 300) -> tuple[torch.Tensor, int]:
    """Scores ``[2, 2, n]`` in float64, and k."""
    n = draw(st.one_of(st.integers(1, 8), st.integers(min(9, largest), largest)))
    k = draw(st.one_of(st.sampled_from([0.1, 0.3, 0.6, 0.9, 1.1]).map(lambda x: max(1, int(x * n))), st.integers(1, 3)))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    kind, spread = draw(st.sampled_from(kinds)), draw(st.sampled_from([1.0, 4.0, 0.01, 1000.0]))
    return _scores(gen, (2, 2, n), kind, spread, k), k


FINITE = ("normal", "rising", "falling", "tied", "integers")


@law(2, drawn=slices())
def test_gates_lie_in_0_1_and_sum_to_k(drawn, device):
    u, k = drawn
    gates = sparsek(u.to(device), k).cpu()
    assert ((gates >= 0) & (gates <= 1)).all()
    pinned, candidates = (u == INF).sum(-1), (u > -INF).sum(-1)
    expected = candidates.clamp(max=k).maximum(pinned).double()
    torch.testing.assert_close(gates.sum(-1), expected, rtol=0, atol=1e-10)
    assert (gates[u == INF] == 1).all() and (gates[u == -INF] == 0).all()


@law(2, drawn=slices())
def test_gates_are_clipped_differences_to_one_threshold(drawn, device):
    """The conditions of Karush, Kuhn and Tucker: they and the sum determine the gates."""
    u, k = drawn
    gates = sparsek(u.to(device), k).cpu()
    finite = u.isfinite()
    inside = finite & (gates > 0) & (gates < 1)
    # u - tau is 1 or more, strictly between, or 0 or less: bounds on tau from each entry.
    low = torch.where(finite & (gates < 1), u - gates, -INF).amax(-1)
    high = torch.where(finite & (gates > 0), u - gates, INF).amin(-1)
    slack = 1e-12 * (1 + torch.where(finite, u, 0.0).abs().amax(-1))
    assert (low <= high + slack).all()
    if inside.any():
        tally.checked("fractional gates")


@law(drawn=slices(kinds=("normal", "integers", "tied", "integers and infinities"), largest=7))
def test_gates_match_exact_arithmetic(drawn):
    u, k = drawn
    gates = sparsek(u, k)
    for scores, mine in zip(u.flatten(0, 1).tolist(), gates.flatten(0, 1).tolist(), strict=True):
        exact, _ = exact_gates(scores, k)
        assert mine == pytest.approx([float(m) for m in exact], abs=1e-12, rel=0)


@law(drawn=slices(), shift=st.integers(-1000, 1000))
def test_shift_law(drawn, shift):
    u, k = drawn
    # Sums with the shift round, by no more than this; a projection never enlarges a difference.
    torch.testing.assert_close(sparsek(u + shift, k), sparsek(u, k), rtol=0, atol=1e-10)


@law(drawn=slices(), seed=st.integers(0, 1000))
def test_permutation_law(drawn, seed):
    u, k = drawn
    order = torch.randperm(u.shape[-1], generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(sparsek(u[..., order], k), sparsek(u, k)[..., order], rtol=0, atol=1e-11)


@law(drawn=slices(kinds=FINITE), step=st.sampled_from([1e-6, 1e-2, 1.0, 100.0]), seed=st.integers(0, 1000))
def test_projection_never_enlarges_a_distance(drawn, step, seed):
    u, k = drawn
    v = u + step * torch.randn(u.shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    moved = (sparsek(u, k) - sparsek(v, k)).norm(dim=-1)
    assert (moved <= (u - v).norm(dim=-1) + 1e-11).all()


@law(drawn=slices(kinds=FINITE), more=st.integers(0, 3))
def test_identity_at_no_more_candidates_than_k(drawn, more):
    u, _ = drawn
    u = u.clone().requires_grad_()
    gates = sparsek(u, u.shape[-1] + more)
    assert (gates == 1).all()
    (grad,) = torch.autograd.grad(gates.sum(), u, materialize_grads=True)
    assert (grad == 0).all()


@law(drawn=slices(), where=st.sampled_from([0, 1, 2, -2]), dtype=st.sampled_from(DTYPES))
def test_any_dimension_and_dtype(drawn, where, dtype):
    u, k = drawn
    u = u.to(dtype)
    moved = u.movedim(-1, where)
    gates = sparsek(moved, k, dim=where)
    assert gates.dtype == dtype and gates.shape == moved.shape
    expected = sparsek(u.double(), k).movedim(-1, where)
    # One rounding of a number in [0, 1], from gates that are computed no worse than in float32.
    torch.testing.assert_close(gates.double(), expected, rtol=0, atol=max(torch.finfo(dtype).eps / 2, 1e-12))
    assert torch.equal(sparsek(moved.unsqueeze(0).expand(2, *moved.shape)[1], k, where), gates)


@law(drawn=slices(largest=40))
def test_jacobian_on_the_fractional_set(drawn):
    u, k = drawn
    u = u[0, 0].requires_grad_()
    gates = sparsek(u, k).detach()
    finite = u.isfinite()
    inside = finite & (gates > 1e-9) & (gates < 1 - 1e-9)
    # On a kink the projection has no derivative: entries that sit on one make the case void.
    low = torch.where(finite & (gates < 1), u - gates, -INF).amax()
    high = torch.where(finite & (gates > 0), u - gates, INF).amin()
    kinked = finite & ~inside & (((u - low).abs() < 1e-9) | ((u - 1 - high).abs() < 1e-9)) & (high - low < 1e-9)
    assume(not kinked.any())
    jacobian = torch.autograd.functional.jacobian(lambda x: sparsek(x, k), u)
    f = inside.double()
    expected = torch.diag(f) - torch.outer(f, f) / f.sum().clamp(min=1)
    torch.testing.assert_close(jacobian, expected, rtol=0, atol=1e-12)
    tally.checked(f"{'non-empty' if inside.any() else 'empty'} fractional set")


@pytest.mark.parametrize(
    ("scores", "k", "fractional"),
    [
        ([2.5, 2.5, 2.0], 1, [1, 1, 0]),  # a gate of exactly 0
        ([2.0, 1.5, 1.5, 0.0], 2, [0, 1, 1, 0]),  # a gate of exactly 1
        ([3.0, 1.0, 1.0, 0.0], 1, [0, 0, 0, 0]),  # no fractional gate near the tie
        ([3.0, 3.0, 1.0, 1.0], 3, [0, 0, 1, 1]),
    ],
)
def test_jacobian_beside_gates_of_0_and_1(scores, k, fractional):
    jacobian = torch.autograd.functional.jacobian(lambda x: sparsek(x, k), torch.tensor(scores, dtype=F64))
    f = torch.tensor(fractional, dtype=F64)
    torch.testing.assert_close(jacobian, torch.diag(f) - torch.outer(f, f) / f.sum().clamp(min=1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 5, 9])
@pytest.mark.parametrize("seed", range(3))
def test_gradcheck_and_gradgradcheck(k, seed):
    gen = torch.Generator().manual_seed(seed)
    u = torch.randn(2, 12, generator=gen, dtype=F64)
    u[0, 0], u[0, 1] = INF, -INF
    finite = u.isfinite()
    gates = sparsek(u, k)
    inside = finite & (gates > 0) & (gates < 1)
    assert inside[1].any()  # in row 0 the pinned entry takes the whole of k = 1

    def project(x):
        return sparsek(torch.where(finite, x, u), k)

    start = torch.where(finite, u, 0.0).requires_grad_()
    assert torch.autograd.gradcheck(project, start)
    assert torch.autograd.gradgradcheck(lambda x: project(x).square(), start)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_slice(dtype):
    u = torch.tensor([[1.0, 2.0, 0.5], [1.0, float("nan"), 0.5], [3.0, INF, -INF]], dtype=dtype)
    gates = sparsek(u, 2)
    assert gates[1].isnan().all()
    assert torch.equal(gates[0], sparsek(u[0], 2)) and torch.equal(gates[2], torch.tensor([1, 1, 0]).to(dtype))


@pytest.mark.parametrize(
    ("scores", "k", "gates"),
    [
        ([-INF, -INF], 1, [0, 0]),
        ([INF, INF, 5.0], 1, [1, 1, 0]),  # more pinned than k: exactly those
        ([INF, INF, 5.0], 2, [1, 1, 0]),
        ([INF, 1.0, 1.0, -INF], 2, [1, 0.5, 0.5, 0]),
        ([INF, -7.0, -INF], 3, [1, 1, 0]),  # fewer candidates than k
        ([0.25, 0.0, -9.0], 1, [0.625, 0.375, 0]),
        ([1e30, 1e30, 0.0], 1, [0.5, 0.5, 0]),  # where u - 1 rounds to u
        ([1e30, 1e30, 0.0], 2, [1, 1, 0]),
        ([-1e30, 0.0, 1e30], 2, [0, 1, 1]),
    ],
)
def test_gates_of_special_scores(scores, k, gates):
    assert sparsek(torch.tensor(scores, dtype=F64), k).tolist() == gates
    assert sparsek(torch.tensor(scores), k).tolist() == gates


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4), (2, 0, 3)])
def test_empty_slices(shape):
    u = torch.zeros(shape, requires_grad=True)
    for dim in range(len(shape)):
        gates = sparsek(u, 2, dim)
        assert gates.shape == shape
        assert torch.autograd.grad(gates.sum(), u, materialize_grads=True)[0].shape == shape


@pytest.mark.parametrize("k", [0, -1, 1.5, None, True, "2"])
def test_bad_k(k):
    with pytest.raises(ValueError, match="k must be"):
        sparsek(torch.zeros(3), k)


@pytest.mark.parametrize("scores", [torch.zeros(3, dtype=torch.int64), torch.tensor(1.0), [1.0, 2.0], None])
def test_bad_scores(scores):
    with pytest.raises(ValueError, match="floating-point"):
        sparsek(scores, 1)


def brute_force(problem: Problem, u: list[float], candidate: list[bool], latest: list[bool]) -> list[float]:
    """Gates of one query of one head, from the text of the contract."""
    masked = [score if c else -INF for score, c in zip(u, candidate, strict=True)]
    if problem.hard:
        pinned = {j for j, score in enumerate(masked) if score == INF}
        order = sorted((j for j, score in enumerate(masked) if score > -INF), key=lambda j: (-masked[j], j))
        kept = pinned | set(order[: problem.num_keys])
        return [float(late or j in kept) for j, late in enumerate(latest)]
    exact, _ = exact_gates(masked, problem.num_keys)
    return [1.0 if late else float(m) for m, late in zip(exact, latest, strict=True)]


@law(drawn=problems(sizes=("tiny",), spreads=(1.0, 4.0)))
def test_dense_bias_matches_the_contract(drawn):
    inputs = drawn.inputs()
    pattern = Pattern(drawn, "cpu")
    shape = (drawn.batch, drawn.heads, drawn.queries, drawn.keys)
    bias = bias_of(drawn, inputs, inputs.scores).materialize(shape, F64)
    assert bias.shape == shape and bias.dtype == F64
    for b in range(drawn.batch):
        for h in range(drawn.heads):
            u = inputs.scores[b, :, h // drawn.ratio].tolist()
            for i in range(drawn.queries):
                gates = brute_force(drawn, u, pattern.candidate[i].tolist(), pattern.latest[i].tolist())
                assert bias[b, h, i].exp().tolist() == pytest.approx(gates, abs=1e-12, rel=0)
    if bias.numel():
        tally.checked("bias")


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_dense_bias_in_5d_and_other_dtypes(dtype):
    scores = torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(0))
    bias = SparseKBias(scores, 2, window=1)
    exact = bias.materialize((2, 6, 9, 9), F64)
    assert torch.equal(bias.materialize((2, 3, 2, 9, 9), dtype), exact.to(dtype).reshape(2, 3, 2, 9, 9))
    # Query 0 sees itself alone; query 8 sees itself and two candidates' worth.
    assert exact[0, 0, 0].exp().tolist() == [1] + [0] * 8
    assert math.isclose(exact[0, 0, 8].exp().sum().item(), 3.0, rel_tol=1e-12)
    with pytest.raises(ValueError, match="has no shape"):
        bias.materialize((2, 4, 9, 9), dtype)
