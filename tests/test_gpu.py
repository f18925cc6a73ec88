"""What serving and training need of the operators on a GPU: graphs, streams, no waiting, long sequences."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from reference import QUANTITIES, Reference, Results, operator
from strategies import BF16, F32, F64, Problem
from torch import Tensor

from xformers_sparsek import sparsek_attention
from xformers_sparsek.attention import attend

pytestmark = pytest.mark.cuda


@pytest.fixture
def device() -> Iterator[torch.device]:
    if not torch.cuda.is_available():
        pytest.fail("-m cuda needs a GPU that PyTorch can use")
    yield torch.device("cuda")
    torch.cuda.empty_cache()  # some tests take tens of GB, and several processes share the card


def problem(**changes) -> Problem:
    base = Problem(
        lengths=((700, 700),), packed=False, batch=2, groups=2, ratio=2, width=64, value_width=64, dtype=BF16,
        score_dtype=F32, kind="normal", spread=4.0, num_keys=64, window=16, causal=True, hard=False, scale=None,
        sharpness=1.0, layouts=("contiguous",) * 5, lse_grad=True, seed=0,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


CASES = {
    "tensor cores": {},
    "not causal": {"causal": False, "window": 0},
    "packed": {"lengths": ((300, 300), (1, 400), (50, 20)), "packed": True, "batch": 1},
    "hard": {"hard": True},
    "plain cores": {"dtype": F32},
}
cases = pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())


def same(a: Results, b: Results) -> None:
    for name in QUANTITIES:
        assert torch.equal(a[name], b[name]), name


@cases
def test_nothing_waits_for_the_device(changes, device):
    drawn = problem(**changes)
    inputs = drawn.inputs(device)
    operator(drawn, inputs)  # the first call may load code
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        operator(drawn, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@cases
def test_graphs_replay_on_new_inputs(changes, device):
    """Forward and backward in one CUDA graph, whose lists then hold other keys."""
    drawn = problem(**changes)
    static, other = drawn.inputs(device), dataclasses.replace(drawn, seed=1).inputs(device)
    expected = operator(drawn, other)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        operator(drawn, static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = operator(drawn, static)
    for name in ("query", "key", "value", "scores", "grad_out", "grad_lse"):
        getattr(static, name).copy_(getattr(other, name))
    graph.replay()
    same(results, expected)


@cases
def test_any_stream(changes, device):
    """The stream of the caller is used: what is queued before it there is seen."""
    drawn = problem(**changes)
    inputs = drawn.inputs(device)
    expected = operator(drawn, inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = dataclasses.replace(
            inputs, **{x: getattr(inputs, x).clone() for x in ("query", "key", "value", "scores")}
        )
        results = operator(drawn, late)
    torch.cuda.synchronize()
    same(results, expected)


@cases
def test_every_element_is_written(changes, device):
    """Memory that held NaN before does not show through."""
    drawn = problem(**changes)
    inputs = drawn.inputs(device)
    expected = operator(drawn, inputs)
    for _ in range(3):
        torch.cuda.empty_cache()
        waste = [torch.full((1 << 20,), torch.nan, device=device) for _ in range(64)]
        waste += [torch.full((1 << 10,), torch.nan, device=device) for _ in range(256)]
        del waste
        same(operator(drawn, inputs), expected)


@cases
def test_a_thousand_runs_beside_other_work(changes, device):
    drawn = problem(**changes)
    inputs = drawn.inputs(device)
    expected = operator(drawn, inputs)
    other = torch.cuda.Stream()
    a = torch.randn(2048, 2048, device=device)
    for _ in range(1000):
        with torch.cuda.stream(other):
            a @ a
        same(operator(drawn, inputs), expected)


def test_deterministic_mode(device):
    drawn = problem()
    inputs = drawn.inputs(device)
    expected = operator(drawn, inputs)
    torch.use_deterministic_algorithms(True)
    try:
        same(operator(drawn, inputs), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_one_key_seen_by_65536_queries(dtype, device):
    """Its gradients are sums over all of them."""
    n = 65536 + 128
    gen = torch.Generator(device).manual_seed(0)
    query, key, value, grad = (torch.randn(1, n, 1, 64, device=device, generator=gen) for _ in range(4))
    scores = torch.full((1, n, 1), -torch.inf, device=device)
    scores[0, 0] = torch.inf
    leaves = [x.to(dtype).requires_grad_() for x in (query, key, value)]
    out = sparsek_attention(*leaves, scores, 1)
    dq, dk, dv = torch.autograd.grad(out, leaves, grad.to(dtype))
    assert torch.equal(out, leaves[2][:, :1].expand_as(out))
    assert (dq.abs() < 1e-2).all() and (dk[:, 1:] == 0).all() and (dv[:, 1:] == 0).all()
    torch.testing.assert_close(dv[0, 0, 0].double(), grad.to(dtype).double().sum((0, 1, 2)), rtol=1e-2, atol=0.5)


@pytest.mark.parametrize("num_keys", [50, 700])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(("step", "noise"), [(1.0, 0.5), (0.01, 0.2), (300.0, 100.0), (0.001, 0.5)])
def test_rising_scores_are_selected_as_on_a_cpu(step, noise, dtype, num_keys, device):
    """Every new key enters: tiles that may be sorted, and some that seem to be such and are not."""
    generator = torch.Generator().manual_seed(0)
    scores = step * torch.arange(6000)[:, None] + noise * torch.randn(2, 6000, 3, generator=generator, dtype=dtype)
    scores[0, :5] = torch.inf
    arguments = (None, None, 6000, num_keys, 0, True, False)
    expected = torch.ops.xformers_sparsek.select(scores, *arguments)
    for mine, its in zip(torch.ops.xformers_sparsek.select(scores.to(device), *arguments), expected, strict=True):
        assert torch.equal(mine.cpu(), its)


@pytest.mark.parametrize("width", [64, 128])
def test_a_million_tokens(width, device):
    """Tensors of more than 2^31 elements: the last queries alone give the same, whatever lies before."""
    n, heads = 1 << 20, (1 << 31) // (1 << 20) // width + 1
    gen = torch.Generator(device).manual_seed(0)
    query, key, value = (torch.randn(1, n, heads, width, device=device, dtype=BF16, generator=gen) for _ in range(3))
    scores = torch.randn(1, n, heads, device=device, generator=gen) * 4
    out, lse = sparsek_attention(query, key, value, scores, 256, window=64, return_lse=True)
    assert query.numel() > 2**31
    for rows in (slice(n - 300, n), slice(n // 2, n // 2 + 300)):
        part = slice(0, rows.stop)
        alone = sparsek_attention(query[:, rows], key[:, part], value[:, part], scores[:, part], 256, window=64)
        assert (out[:, rows].float() - alone.float()).abs().max() < 0.05
    assert out.isfinite().all() and lse.isfinite().all()


@pytest.mark.parametrize(("groups", "ratio"), [(14, 1), (4, 4)])
def test_many_groups_of_a_long_sequence(groups, ratio, device):
    """So many that Hopper's forward attends for a half of them after the other: each has the bits that it has alone."""
    n, width = 33000, 128
    gen = torch.Generator(device).manual_seed(0)
    query = torch.randn(1, n, groups * ratio, width, device=device, dtype=BF16, generator=gen)
    key, value = (torch.randn(1, n, groups, width, device=device, dtype=BF16, generator=gen) for _ in range(2))
    scores = torch.randn(1, n, groups, device=device, generator=gen) * 4
    out, lse = sparsek_attention(query, key, value, scores, 1024, return_lse=True)
    assert out.isfinite().all() and lse.isfinite().all()
    for group in {0, groups // 2 - 1, groups // 2, groups - 1}:
        mine, heads = slice(group, group + 1), slice(group * ratio, (group + 1) * ratio)
        parts = (query[:, :, heads], key[:, :, mine], value[:, :, mine], scores[:, :, mine])
        alone, its_lse = sparsek_attention(*parts, 1024, return_lse=True)
        assert torch.equal(out[:, :, heads], alone) and torch.equal(lse[:, heads], its_lse)


def test_more_heads_than_a_grid_dimension_holds(device):
    drawn = problem(lengths=((3, 5),), batch=70001, groups=1, ratio=1, width=8, value_width=8, num_keys=2, window=0)
    inputs = drawn.inputs(device)
    results = operator(drawn, inputs)
    one = dataclasses.replace(drawn, batch=1)
    last = [x[-1:] for x in (inputs.query, inputs.key, inputs.value, inputs.scores, inputs.grad_out, inputs.grad_lse)]
    part = dataclasses.replace(inputs, **dict(zip(("query", "key", "value", "scores", "grad_out", "grad_lse"), last)))
    alone = operator(one, part)
    for name in QUANTITIES:
        assert torch.equal(results[name][-1:], alone[name]), name
    Reference(one, part).check(alone)


@cases
def test_compiles_in_one_graph(changes, device):
    drawn = problem(**changes)
    inputs = drawn.inputs(device)

    def attention(query: Tensor, key: Tensor, value: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        return sparsek_attention(
            query, key, value, scores, drawn.num_keys, cu_seqlens=inputs.cu_seqlens, return_lse=True, **drawn.options
        )

    tensors = (inputs.query, inputs.key, inputs.value, inputs.scores)
    compiled = torch.compile(attention, fullgraph=True)(*tensors)
    for a, b in zip(compiled, attention(*tensors), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("width", [64, 128])
def test_memory_of_forward(width, device):
    """At k=1024 and 32K tokens: at most half of what keys and values take, and 64 bytes per token and head for lists,
    thresholds and LSE, without the copies of rows that Hopper's kernel takes beside them."""
    n, heads = 32768, 8
    query, key, value = (torch.randn(1, n, heads, width, device=device, dtype=BF16) for _ in range(3))
    scores = torch.randn(1, n, heads, device=device) * 4

    def extra(kernel: str | None) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        pattern = (1024, 0, True, False, None, None)
        with torch.no_grad():
            out, _ = attend(query, key, value, scores, *pattern, width**-0.5, forward_kernel=kernel)
        return torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()

    assert extra(None) <= 0.5 * (key.numel() + value.numel()) * 2
    assert extra("sm80") <= 64 * n * heads
