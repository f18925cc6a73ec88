"""The xFormers call: values and gradients through every entry point. Runs with either layout of xFormers."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
import xformers.ops as xops
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from xformers.ops import fmha
from xformers_case import Case, attend, attend_dense, check, compare, dense, make, results

from xformers_sparsek import SparseKBias
from xformers_sparsek.xformers_ops import CPU, SIMT, SM80, SM90


@pytest.fixture(params=[False, True], ids=["op=None", "op by hand"])
def op(request: pytest.FixtureRequest, device: torch.device) -> tuple | None:
    return {"cpu": CPU, "cuda": SIMT}[device.type] if request.param else None


@pytest.mark.parametrize("ratio", [1, 2, 3, 6])
@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("is_5d", [False, True])
def test_layouts(is_5d: bool, expanded: bool, ratio: int, device: torch.device) -> None:
    # In 4-D only one group can be expanded: the heads of several have no common stride.
    groups = 1 if expanded and not is_5d else 2
    check(make(device=device, groups=groups, ratio=ratio, is_5d=is_5d, expanded=expanded, window=3))


def test_one_key_head_for_several_score_heads(device: torch.device) -> None:
    """Key and value of one head, expanded to all heads, while the scores have two."""
    case = make(device=device, groups=1, ratio=4, batch=1, is_5d=False, expanded=True)
    check(dataclasses.replace(case, scores=torch.stack([case.scores[..., 0], -case.scores[..., 0]], -1)))


@pytest.mark.parametrize("expanded", ["key", "value"])
def test_only_one_of_key_and_value_is_expanded(expanded: str, device: torch.device) -> None:
    case = make(device=device, groups=2, ratio=3, is_5d=True)
    check(dataclasses.replace(case, **{expanded: getattr(case, expanded)[:, :, :, :1].clone()}))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 5},
        {"window": 100},
        {"k": 1},
        {"k": 100},
        {"causal": False},
        {"causal": False, "queries": 20, "keys": 53},
        {"hard": True},
        {"hard": True, "window": 4, "causal": True},
        {"queries": 21, "keys": 53, "window": 2},
        {"queries": 53, "keys": 21},  # the first queries see no key
        {"queries": 1, "keys": 40},
        {"keys": 0},
        {"queries": 0},
        {"batch": 0},
        {"value_width": 5},
        {"width": 1, "value_width": 12},
        {"scale": 0.7},
        {"scale": -1.5},
        {"scale": 0.0},
        {"score_dtype": torch.float32},
    ],
    ids=str,
)
@pytest.mark.parametrize("is_5d", [False, True])
def test_options(is_5d: bool, options: dict, device: torch.device) -> None:
    case = make(device=device, groups=2, ratio=3, is_5d=is_5d, expanded=is_5d, **options)
    if case.grad.numel() == 0 or case.key.numel() == 0:
        case, function = case.differentiable(), attend
        out = function(case)
        out.backward(case.grad)
        assert out.shape == case.grad.shape
        assert all(x.grad is not None and not x.grad.any() for x in case.leaves.values())
        assert not out.any()
    else:
        check(case)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype, device: torch.device, op: tuple | None) -> None:
    check(make(device=device, dtype=dtype, ratio=2, window=4, width=32), lambda case: attend(case, op))
    check(make(device=device, dtype=dtype, ratio=3, is_5d=True, expanded=True), lambda case: attend(case, op))


@pytest.mark.cuda
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"width": 128, "value_width": 64, "window": 20}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backward", [SM90[1], SM80[1], SIMT[1]], ids=lambda op: op.NAME)
@pytest.mark.parametrize("forward", [SM90[0], SM80[0], SIMT[0]], ids=lambda op: op.NAME)
def test_kernels(forward: type, backward: type, dtype: torch.dtype, options: dict) -> None:
    """Every forward kernel with every backward kernel."""
    if torch.cuda.get_device_capability() != (9, 0) and (forward is SM90[0] or backward is SM90[1]):
        pytest.skip("needs compute capability 9.0")
    case = make(device="cuda", dtype=dtype, ratio=2, is_5d=True, expanded=True, queries=150, keys=300, k=40, **options)
    check(case, lambda case: attend(case, (forward, backward)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_scores(dtype: torch.dtype, device: torch.device) -> None:
    check(make(device=device, dtype=dtype, score_dtype=dtype, window=4))


def test_packed_sequences(device: torch.device) -> None:
    lengths_q, lengths_k = (5, 0, 30, 1), (5, 3, 37, 0)
    case = make(device=device, batch=1, queries=sum(lengths_q), keys=sum(lengths_k), ratio=2)

    def packed(case: Case) -> SparseKBias:
        return SparseKBias.from_seqlens(case.scores, 4, lengths_q, lengths_k, window=2)

    def call(case: Case) -> Tensor:
        return xops.memory_efficient_attention(*case.tensors(), packed(case))

    def reference(case: Case) -> Tensor:
        return dense(*case.tensors(), packed(case), None)[0]

    compare(case, results(case, call), results(case.double(), reference), results(case, reference))


def test_non_contiguous_inputs(device: torch.device) -> None:
    """Slices of one fused projection, as models make query, key and value."""
    case = make(device=device, groups=2, ratio=1)
    fused = torch.cat([x.flatten(2) for x in case.tensors()], -1).requires_grad_()

    def call(function) -> tuple[Tensor, Tensor]:
        query, key, value = (x.unflatten(-1, (2, 8)) for x in fused.chunk(3, -1))
        out = function(query, key, value, case.bias())
        (grad,) = torch.autograd.grad(out, fused, case.grad)
        return out, grad

    for actual, expected in zip(
        call(xops.memory_efficient_attention), call(lambda *inputs: dense(*inputs, scale=None)[0])
    ):
        torch.testing.assert_close(actual, expected)


# ------------------------------------------------------------------------------------------------- other entry points


@pytest.mark.parametrize("is_5d", [False, True])
def test_forward_and_backward_without_autograd(is_5d: bool, device: torch.device, op: tuple | None) -> None:
    fw, bw = op or (None, None)
    case = make(device=device, groups=2, ratio=3, queries=30, keys=41, is_5d=is_5d, expanded=is_5d, scale=0.4)
    inputs, bias, scale = case.tensors(), case.bias(), case.scale
    expected = results(case, attend_dense)
    lse_shape = (2, 2, 3, 30) if is_5d else (2, 6, 30)
    expected_lse = dense(*inputs, bias, scale)[1].reshape(lse_shape)

    out = xops.memory_efficient_attention_forward(*inputs, bias, scale=scale, op=fw)
    torch.testing.assert_close(out, expected["out"])
    out, lse = xops.memory_efficient_attention_forward_requires_grad(*inputs, bias, scale=scale, op=fw)
    torch.testing.assert_close(out, expected["out"])
    torch.testing.assert_close(lse, expected_lse)
    partial, partial_lse = fmha.memory_efficient_attention_partial(*inputs, bias, scale=scale, op=fw)
    torch.testing.assert_close(partial, out, rtol=0, atol=0)
    torch.testing.assert_close(partial_lse, lse, rtol=0, atol=0)

    grads = xops.memory_efficient_attention_backward(case.grad, out, lse, *inputs, bias, scale=scale, op=bw)
    assert [x.shape for x in grads] == [x.shape for x in inputs]
    for name, grad in zip(("query", "key", "value"), grads):
        # Of an expanded tensor only the sum over its heads is defined.
        total = grad.reshape(*grad.shape[:2], 2, 3, -1)
        total = total.sum(3, keepdim=True) if is_5d and name != "query" else total
        torch.testing.assert_close(total, expected[name], msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_partial_is_wide(dtype: torch.dtype, device: torch.device) -> None:
    """``_partial`` gives float32 by itself, as xFormers' own operators do, and any dtype on request."""
    case = make(device=device, dtype=dtype)
    exact = attend_dense(case.double())
    out, lse = fmha.memory_efficient_attention_partial(*case.tensors(), case.bias())
    assert out.dtype == lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), exact, rtol=4e-6, atol=4e-6)
    out, _ = fmha.memory_efficient_attention_partial(*case.tensors(), case.bias(), output_dtype=dtype)
    assert out.dtype == dtype


@pytest.mark.parametrize("wanted", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_output_dtype(dtype: torch.dtype, wanted: torch.dtype, device: torch.device) -> None:
    case = make(device=device, dtype=dtype, ratio=2)
    exact = results(case.double(), attend_dense)
    for moving in (case, case.differentiable()):
        out = attend(moving, output_dtype=wanted)
        assert out.dtype == wanted
        # Narrowed or widened at the end of the same computation.
        torch.testing.assert_close(out.double(), exact["out"], **_tolerance(dtype, wanted))
    out.backward(case.grad.to(wanted))
    for name, grad in moving.grads().items():
        torch.testing.assert_close(grad.double(), exact[name], **_tolerance(dtype, wanted))


def _tolerance(*dtypes: torch.dtype) -> dict[str, float]:
    error = 32 * max(torch.finfo(dtype).eps for dtype in dtypes)
    return {"rtol": error, "atol": error}


# -------------------------------------------------------------------------------------------------------- autograd


@pytest.mark.parametrize(
    "names",
    [("scores",), ("query",), ("value", "scores"), ("key",), ("key", "scores"), ("query", "key", "value")],
    ids=str,
)
def test_only_some_inputs_require_gradients(names: tuple[str, ...], device: torch.device, op: tuple | None) -> None:
    case = make(device=device, ratio=2, window=3)
    expected = results(case, attend_dense)
    case = case.differentiable(*names)
    attend(case, op).backward(case.grad)
    assert case.grads().keys() == set(names)
    for name in names:
        torch.testing.assert_close(getattr(case, name).grad, expected[name])


def test_no_graph_without_gradients(device: torch.device) -> None:
    case = make(device=device)
    assert not attend(case).requires_grad
    with torch.no_grad():
        out = attend(case.differentiable())
    assert not out.requires_grad
    with torch.inference_mode():
        inference = attend(case)
    torch.testing.assert_close(out, inference, rtol=0, atol=0)


def test_one_bias_in_two_calls(device: torch.device) -> None:
    """As a model does whose layers share a selection: the gradients of both calls add up."""
    first = make(device=device).differentiable()
    second = dataclasses.replace(make(device=device, seed=1), scores=first.scores).differentiable(
        "query", "key", "value"
    )
    second.scores = first.scores

    def total(function) -> list[Tensor]:
        bias = first.bias()
        out = sum(function(*case.tensors(), bias).mul(case.grad).sum() for case in (first, second))
        return torch.autograd.grad(out, [first.scores, first.key, second.key, second.query])

    actual = total(xops.memory_efficient_attention)
    for got, expected in zip(actual, total(lambda *inputs: dense(*inputs, scale=None)[0])):
        torch.testing.assert_close(got, expected)


def test_one_score_tensor_in_two_biases(device: torch.device) -> None:
    case = make(device=device).differentiable()

    def total(function) -> list[Tensor]:
        biases = SparseKBias(case.scores, 5, window=2), SparseKBias(case.scores, 12, causal=False)
        out = sum(function(*case.tensors(), bias) for bias in biases)
        return torch.autograd.grad(out, list(case.leaves.values()), case.grad)

    actual = total(xops.memory_efficient_attention)
    for got, expected in zip(actual, total(lambda *inputs: dense(*inputs, scale=None)[0])):
        torch.testing.assert_close(got, expected)


def test_the_bias_is_left_alone(device: torch.device) -> None:
    case = make(device=device).differentiable()
    bias = case.bias()
    before = dict(vars(bias))
    xops.memory_efficient_attention(*case.tensors(), bias).sum().backward()
    assert vars(bias).keys() == before.keys()
    assert all(value is before[name] for name, value in vars(bias).items())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool, device: torch.device) -> None:
    case = make(device=device, ratio=2, window=3)

    def call(case: Case) -> Tensor:
        def layer(query: Tensor, key: Tensor, value: Tensor, scores: Tensor) -> Tensor:
            inner = dataclasses.replace(case, query=query, key=key, value=value, scores=scores * 1)
            return attend(inner)

        return checkpoint(layer, *case.leaves.values(), use_reentrant=reentrant)

    check(case, call)


def test_checkpointing_a_bias_made_outside(device: torch.device) -> None:
    """The scores are then no argument of the checkpointed function; only the non-reentrant kind sees them."""

    def call(case: Case) -> Tensor:
        bias = case.bias()
        return checkpoint(xops.memory_efficient_attention, *case.tensors(), bias, use_reentrant=False)

    check(make(device=device), call)


def test_two_backward_passes_through_one_graph(device: torch.device) -> None:
    case = make(device=device, ratio=2).differentiable()
    out, leaves = attend(case), list(case.leaves.values())
    first = torch.autograd.grad(out, leaves, case.grad, retain_graph=True)
    only_scores = torch.autograd.grad(out, case.scores, case.grad, retain_graph=True)
    torch.autograd.grad(out, case.query, case.grad, retain_graph=True)  # stops before the node of the scores
    doubled = torch.autograd.grad(out, leaves, 2 * case.grad)
    torch.testing.assert_close(only_scores[0], first[3], rtol=0, atol=0)
    for one, two in zip(first, doubled):
        torch.testing.assert_close(2 * one, two)


def test_gradients_are_not_differentiable_again(device: torch.device) -> None:
    case = make(device=device).differentiable()
    (grad,) = torch.autograd.grad(attend(case).sum(), case.scores, create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        grad.sum().backward()


# ------------------------------------------------- entry points whose own autograd knows nothing of a bias' gradient


def _refused_or_right(case: Case, out: Tensor) -> None:
    """Backward through ``out`` must give the scores' true gradient or an error that speaks of it."""
    try:
        out.backward(case.grad.to(out.dtype))
    except RuntimeError as error:
        assert "scores" in str(error)
        return
    torch.testing.assert_close(case.scores.grad, results(case, attend_dense)["scores"])


@pytest.mark.skipif(
    "_allow_backward" not in inspect.signature(fmha.memory_efficient_attention_partial).parameters,
    reason="this layout's _partial has no backward",
)
def test_partial_never_loses_the_gradient_of_scores(op: tuple | None, device: torch.device) -> None:
    case = make(device=device, ratio=2, is_5d=False)

    def partial(case: Case) -> Tensor:
        return fmha.memory_efficient_attention_partial(*case.tensors(), case.bias(), op=op, _allow_backward=True)[0]

    moving = case.differentiable()
    _refused_or_right(moving, partial(moving))
    # Without scores in the graph it works as for any other bias.
    expected = results(case, attend_dense)
    frozen = case.differentiable("query", "key", "value")
    partial(frozen).backward(case.grad)
    for name, grad in frozen.grads().items():
        torch.testing.assert_close(grad, expected[name])
    # Nor may it pretend that nothing needs a gradient.
    alone = case.differentiable("scores")
    _refused_or_right(alone, partial(alone))


@pytest.mark.parametrize(
    "function",
    [
        fmha.memory_efficient_attention_forward,
        lambda *inputs: fmha.memory_efficient_attention_forward_requires_grad(*inputs)[0],
        lambda *inputs: fmha.memory_efficient_attention_partial(*inputs)[0],
    ],
    ids=["forward", "forward_requires_grad", "partial"],
)
def test_forward_entry_points_differentiate_too(function, device: torch.device) -> None:
    """xFormers promises no gradients there; ours are right rather than missing."""
    check(make(device=device, ratio=3, is_5d=True, expanded=True), lambda case: function(*case.tensors(), case.bias()))


def test_merged_partials_never_lose_the_gradient_of_scores(device: torch.device) -> None:
    from xformers.ops.fmha.merge_training import memory_efficient_attention_partial_autograd, merge_attentions_autograd

    case = make(device=device)

    def merged(case: Case) -> Tensor:
        return merge_attentions_autograd(memory_efficient_attention_partial_autograd(*case.tensors(), case.bias()))

    moving = case.differentiable()
    _refused_or_right(moving, merged(moving))
    expected = results(case, attend_dense)
    frozen = case.differentiable("query", "key", "value")
    merged(frozen).backward(case.grad)
    for name, grad in frozen.grads().items():
        torch.testing.assert_close(grad, expected[name])


def test_an_operator_that_does_not_fit_is_refused(device: torch.device) -> None:
    case = make(device=device)
    query, key, value = case.tensors()
    for op in (CPU, (CPU[0], None)):
        with pytest.raises(ValueError, match="attn_bias type is <class 'NoneType'>"):
            xops.memory_efficient_attention(query, key, value, op=op)
    with pytest.raises(ValueError, match="attn_bias type is"):
        attend(case, (fmha.ALL_FW_OPS[0], None))
    for forward in (None, CPU[0]):
        with pytest.raises(ValueError, match="attn_bias type is"):
            attend(case, (forward, fmha.ALL_BW_OPS[0]))
    assert isinstance(case.bias(), xops.AttentionBias)
    assert isinstance(case.bias(), fmha.attn_bias.AttentionBias)
