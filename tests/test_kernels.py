"""The tensor-core kernels of CUDA, each by name, on what they take: 16-bit inputs with aligned rows."""

from __future__ import annotations

import dataclasses

import pytest
import tally
import torch
from hypothesis import strategies as st
from reference import GRADS, QUANTITIES, Reference, Results
from strategies import BF16, F16, F32, Inputs, Problem, law, problems

from xformers_sparsek.attention import attend, scale_of

ALIGNED = ("contiguous", "transposed", "fused", "shared batch", "shared heads")
WIDTHS = st.sampled_from([8, 16, 40, 64, 64, 72, 96, 128, 128])
WIDE = st.sampled_from([136, 160, 192, 256])
SHORT = 2048  # keys, see csrc/cuda/sm90/short_forward/launch.h
#: Kernels of forward and backward; a name that the GPU cannot run is skipped.
KERNELS = (("sm90", "sm90"), ("sm90", "sm80"), ("sm80", "sm80"), ("sm80", "simt"), ("simt", "sm80"))

pytestmark = pytest.mark.cuda


@pytest.fixture(scope="session", params=KERNELS, ids="-".join)
def kernels(request: pytest.FixtureRequest) -> tuple[str, str]:
    if not torch.cuda.is_available():
        pytest.fail("-m cuda needs a GPU that PyTorch can use")
    capability = torch.cuda.get_device_capability()
    if ("sm90" in request.param and capability != (9, 0)) or capability < (8, 0):
        pytest.skip(f"compute capability {capability}")
    return request.param


def aligned(problem: Problem, widths: tuple[int, int]) -> Problem:
    layouts = tuple(layout if layout in ALIGNED else "contiguous" for layout in problem.layouts)
    return dataclasses.replace(
        problem, width=widths[0], value_width=widths[1], layouts=(*layouts[:3], problem.layouts[3], problem.layouts[4])
    )


def run(problem: Problem, inputs: Inputs, kernels: tuple[str, str]) -> Results:
    """Output, LSE and gradients by the kernels named."""
    leaves = [x.detach().requires_grad_() for x in (inputs.query, inputs.key, inputs.value, inputs.scores)]
    lengths = inputs.cu_seqlens or (None, None)
    options = (problem.num_keys, problem.window, problem.causal, problem.hard)
    out, lse = attend(
        *leaves, *options, *lengths, scale_of(leaves[0], problem.scale), forward_kernel=kernels[0],
        backward_kernel=kernels[1],
    )  # fmt: skip
    results, grads = [out], [inputs.grad_out]
    if inputs.grad_lse is not None:
        results, grads = [out, lse], [*grads, inputs.grad_lse]
    gradients = torch.autograd.grad(results, leaves, grads)
    return dict(zip(QUANTITIES, (out.detach(), lse.detach(), *gradients), strict=True))


@law(drawn=problems(dtypes=(BF16, F16)), widths=st.tuples(WIDTHS, WIDTHS))
def test_against_the_dense_reference(drawn, widths, kernels):
    drawn = aligned(drawn, widths)
    inputs = drawn.inputs("cuda")
    Reference(drawn, inputs).check(run(drawn, inputs, kernels))


@law(0.3, drawn=problems(dtypes=(BF16, F16), sizes=("small", "medium")), widths=st.tuples(WIDE, WIDE))
def test_wide_heads(drawn, widths, kernels):
    if "sm90" in kernels:
        pytest.skip("up to 128")
    drawn = aligned(drawn, widths)
    inputs = drawn.inputs("cuda")
    Reference(drawn, inputs).check(run(drawn, inputs, kernels))


@law(
    drawn=problems(dtypes=(BF16, F16)),
    widths=st.tuples(WIDTHS, WIDTHS),
    poison=st.sampled_from([float("nan"), float("inf"), 6e4]),
    what=st.sampled_from(["both", "key", "value"]),
    rate=st.sampled_from([0.01, 0.1, 0.5]),
)
def test_a_key_matters_to_nobody_who_does_not_see_it(drawn, widths, kernels, poison, what, rate):
    drawn = dataclasses.replace(aligned(drawn, widths), layouts=("contiguous",) * 5)
    inputs = drawn.inputs("cuda")
    gen = torch.Generator().manual_seed(drawn.seed)
    poisoned = (torch.rand(drawn.batch, drawn.groups, drawn.keys, generator=gen) < rate).cuda()
    visible = Reference(drawn, inputs).gates > 0
    hit = (visible & poisoned.unsqueeze(-2)).any(-1)
    met = (visible & hit.unsqueeze(-1)).any(-2)
    names = ("key", "value") if what == "both" else (what,)
    mask = poisoned.transpose(1, 2).unsqueeze(-1)
    changed = dataclasses.replace(inputs, **{n: getattr(inputs, n).masked_fill(mask, poison) for n in names})
    before, after = run(drawn, inputs, kernels), run(drawn, changed, kernels)
    clean = ~hit.repeat_interleave(drawn.ratio, 1)
    for name in ("out", "lse", "dq"):
        rows = clean if name == "lse" else clean.transpose(1, 2)
        assert torch.equal(before[name][rows], after[name][rows]), name
    for name in ("dk", "dv"):
        keys = ~met.transpose(1, 2)
        assert torch.equal(before[name][keys], after[name][keys]), name
    if hit.any() and not hit.all():
        tally.checked("clean rows beside poisoned ones")


@law(0.5, drawn=problems(dtypes=(BF16, F16), causal=True), widths=st.tuples(WIDTHS, WIDTHS), cut=st.floats(0, 1))
def test_causality(drawn, widths, kernels, cut):
    """Nothing at later positions reaches an output or an LSE, nor the gradient of its query, to the last bit."""
    drawn = dataclasses.replace(aligned(drawn, widths), layouts=("contiguous",) * 5)
    inputs = drawn.inputs("cuda")
    other = dataclasses.replace(drawn, seed=drawn.seed + 1, kind="integers and infinities").inputs("cuda")
    pattern = Reference(drawn, inputs).pattern
    position = int(cut * max((mk for _, mk in drawn.lengths), default=0)) - 1
    later_key = (pattern.index > position).view(1, -1, 1)
    changed = dataclasses.replace(
        inputs,
        query=torch.where((pattern.position > position).view(1, -1, 1, 1), other.query, inputs.query),
        key=torch.where(later_key.unsqueeze(-1), float("nan"), inputs.key),
        value=torch.where(later_key.unsqueeze(-1), float("nan"), inputs.value),
        scores=torch.where(later_key, other.scores, inputs.scores),
    )
    before, after = run(drawn, inputs, kernels), run(drawn, changed, kernels)
    earlier = (pattern.position <= position).nonzero().flatten()
    for name in ("out", "lse", "dq"):
        dim = 2 if name == "lse" else 1
        assert torch.equal(before[name].index_select(dim, earlier), after[name].index_select(dim, earlier)), name


@pytest.mark.parametrize("kind", ["normal", "rising", "tied"])
@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("ratio", [2, 4])
def test_long_sequences(ratio, kind, window, kernels):
    """Several runs; equal scores keep every key, which no list has room for.

    With four query heads to a key head, so many tiles read a list that Hopper's forward copies its rows first.
    """
    problem = Problem(
        lengths=((4700, 4700),), packed=False, batch=1, groups=1, ratio=ratio, width=64, value_width=64, dtype=BF16,
        score_dtype=F32, kind=kind, spread=4.0, num_keys=300, window=window, causal=True, hard=False, scale=None,
        sharpness=1.0, layouts=("contiguous",) * 5, lse_grad=True, seed=0,
    )  # fmt: skip
    inputs = problem.inputs("cuda")
    first, again = run(problem, inputs, kernels), run(problem, inputs, kernels)
    for name in QUANTITIES:
        assert torch.equal(first[name], again[name]), name
    Reference(problem, inputs).check(first)


def not_causal(keys: int, num_keys: int, width: int, queries: int, groups: int) -> Problem:
    return Problem(
        lengths=((queries, keys),), packed=False, batch=2, groups=groups, ratio=1, width=width, value_width=width,
        dtype=F16, score_dtype=F32, kind="normal", spread=4.0, num_keys=num_keys, window=0, causal=False, hard=False,
        scale=None, sharpness=1.0, layouts=("contiguous",) * 5, lse_grad=True, seed=0,
    )  # fmt: skip


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("keys, num_keys", [(SHORT, 10), (SHORT, 900), (SHORT, SHORT), (SHORT + 1, 900)])
def test_short_sequences_that_are_not_causal(keys, num_keys, width, kernels):
    """About the number of keys up to which Hopper's forward has a kernel of its own."""
    problem = not_causal(keys, num_keys, width, queries=300, groups=2)
    inputs = problem.inputs("cuda")
    first, again = run(problem, inputs, kernels), run(problem, inputs, kernels)
    for name in QUANTITIES:
        assert torch.equal(first[name], again[name]), name
    Reference(problem, inputs).check(first)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("num_keys", [1, 100, 400, 660])
def test_many_short_sequences(num_keys, width, kernels):
    """Several tiles of queries to a head, and more heads than multiprocessors; shared memory has room for the rows of a
    hundred keys, of some hundred at width 64, and not of nearly all, which are brought again for each tile."""
    problem = not_causal(700, num_keys, width, queries=260, groups=140)
    inputs = problem.inputs("cuda")
    results, plain = run(problem, inputs, kernels), run(problem, inputs, ("simt", "simt"))
    for name in ("out", "lse"):
        torch.testing.assert_close(results[name], plain[name], rtol=1e-2, atol=1e-2)
    last = {"query": 2, "key": 2, "value": 2, "scores": 2, "grad_out": 2, "grad_lse": 1}
    last = {name: getattr(inputs, name)[1:].narrow(dim, 138, 2) for name, dim in last.items()}
    part = {name: results[name][1:].narrow(1 if name == "lse" else 2, 138, 2) for name in QUANTITIES}
    Reference(dataclasses.replace(problem, batch=1, groups=2), dataclasses.replace(inputs, **last)).check(part)


@pytest.mark.parametrize("causal", [True, False])
def test_nan_scores_stay_in_their_group(causal, kernels):
    problem = Problem(
        lengths=((300, 300),), packed=False, batch=2, groups=2, ratio=2, width=64, value_width=64, dtype=BF16,
        score_dtype=F32, kind="normal", spread=4.0, num_keys=30, window=10 if causal else 0, causal=causal, hard=False,
        scale=None, sharpness=1.0, layouts=("contiguous",) * 5, lse_grad=False, seed=0,
    )  # fmt: skip
    inputs = problem.inputs("cuda")
    scores = inputs.scores.clone()
    scores[1, 200, 1] = torch.nan
    before = run(problem, inputs, kernels)
    after = run(problem, dataclasses.replace(inputs, scores=scores), kernels)
    for name in QUANTITIES:
        heads = 1 if name == "lse" else 2
        size = before[name].shape[heads]
        bad = torch.arange(size, device="cuda") >= size // 2
        assert after[name][1].index_select(heads - 1, bad.nonzero().flatten()).isnan().all(), name
        assert torch.equal(after[name][0], before[name][0]), name
        good = (~bad).nonzero().flatten()
        assert torch.equal(after[name][1].index_select(heads - 1, good), before[name][1].index_select(heads - 1, good))


@pytest.mark.parametrize("causal", [True, False])
def test_every_head_size_and_group_ratio_has_gradients(causal, kernels):
    for width in (8, 64, 72, 128):
        for ratio in (1, 2, 3, 4, 8, 16):
            problem = Problem(
                lengths=((150, 190),), packed=False, batch=1, groups=2, ratio=ratio, width=width, value_width=width,
                dtype=F16, score_dtype=F32, kind="normal", spread=4.0, num_keys=20, window=5 if causal else 0,
                causal=causal, hard=False, scale=None, sharpness=1.0, layouts=("contiguous",) * 5, lse_grad=True,
                seed=ratio,
            )  # fmt: skip
            inputs = problem.inputs("cuda")
            Reference(problem, inputs).check(run(problem, inputs, kernels), ("out", "lse", *GRADS))
