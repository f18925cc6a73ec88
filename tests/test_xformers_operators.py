"""Which operator is chosen for CUDA tensors, why others are refused, and what is then called: needs no GPU.

Fake tensors stand in for CUDA tensors, and the GPU's compute capability is made up.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import xformers.ops as xops
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from xformers.ops import fmha

from xformers_sparsek import SparseKBias, _library, sparsek_attention
from xformers_sparsek.xformers_ops import CPU, DECODE, FORWARD_OPERATORS, SIMT, SM80, SM90

dispatch = sys.modules[sys.modules[xops.memory_efficient_attention.__module__]._dispatch_fw.__module__]
Inputs = sys.modules[xops.memory_efficient_attention.__module__].Inputs
BF16, F32 = torch.bfloat16, torch.float32
BUILT_FOR = "8.0 9.0a 10.0 12.0"

Gpu = Callable[..., None]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """``gpu(9, 0)`` puts a GPU of that compute capability into the machine; until the test ends tensors are fake."""

    def put(major: int, minor: int, built_for: str = BUILT_FOR) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))
        monkeypatch.setitem(_library.UNAVAILABLE, "cuda", None)
        architectures = tuple(map(_library.Architecture.parse, built_for.split()))
        monkeypatch.setattr(_library, "ARCHITECTURES", architectures)

    with FakeTensorMode():
        put(9, 0)
        yield put


@pytest.fixture
def on_cpu(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets fake CPU tensors go to the kernels for CUDA: without a GPU autograd stops at fake CUDA tensors."""
    for operators in (DECODE, SM90, SM80, SIMT):
        for operator in operators:
            monkeypatch.setattr(operator, "SUPPORTED_DEVICES", {"cpu"})


def tensors(dtype: torch.dtype = BF16, width: int = 64, value_width: int = 64, device: str = "cuda") -> list[Tensor]:
    """Query, key, value and scores."""
    shapes = [(2, 50, 4, width), (2, 50, 4, width), (2, 50, 4, value_width)]
    tensors = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
    return [*tensors, torch.empty(2, 50, 4, device=device)]


def inputs(query: Tensor, key: Tensor, value: Tensor, scores: Tensor) -> Any:
    return Inputs(query, key, value, attn_bias=SparseKBias(scores, 8))


def chosen(*tensors: Tensor) -> tuple[type, type]:
    inp = inputs(*tensors)
    return dispatch._dispatch_fw(inp, True), dispatch._dispatch_bw(inp, varlen_lse_packed=None)


def strided(x: Tensor) -> Tensor:
    return torch.stack([x, x], -1)[..., 0]


def shifted(x: Tensor) -> Tensor:
    """Rows that start one element late."""
    return torch.cat([x, x[..., :8]], -1)[..., 1 : 1 + x.shape[-1]]


def narrowed(x: Tensor) -> Tensor:
    return x[..., :60]


# ------------------------------------------------------------------------------------------------------------- choice


@pytest.mark.parametrize(
    ("capability", "best"),
    [((8, 0), SM80), ((8, 6), SM80), ((9, 0), SM90), ((10, 0), SM80), ((10, 3), SM80), ((12, 0), SM80)],
    ids=str,
)
def test_choice_by_gpu(capability: tuple[int, int], best: tuple, gpu: Gpu) -> None:
    gpu(*capability)
    for dtype in (BF16, torch.float16):
        assert chosen(*tensors(dtype)) == best
        assert chosen(*tensors(dtype, width=128, value_width=8)) == best
        assert chosen(*tensors(dtype, width=256, value_width=8)) == SM80
    for dtype in (F32, torch.float64):
        assert chosen(*tensors(dtype)) == SIMT


def test_choice_by_queries(on_cpu: None) -> None:
    """Few queries go to the kernel that shares out their keys."""
    query, key, value, scores = tensors(device="cpu")
    backward = chosen(query, key, value, scores)[1]
    for count, forward in ((1, DECODE), (8, DECODE), (9, SM90)):
        assert chosen(query[:, :count], key, value, scores) == (forward[0], backward)
    assert chosen(query[:, :1], key, value[..., :60], scores) == SIMT
    wide = tensors(width=256, device="cpu")
    assert chosen(wide[0][:, :1], *wide[1:]) == SM80


def test_choice_by_library(gpu: Gpu) -> None:
    """A library without Hopper's kernel runs there if the driver can compile it."""
    gpu(9, 0, built_for="8.0+PTX")
    assert chosen(*tensors()) == SM80
    assert not SM90[0].is_available()
    gpu(9, 0, built_for="9.0")
    assert chosen(*tensors()) == SM90


def test_choice_by_width(on_cpu: None) -> None:
    """Widths that the tensor cores' 16-byte copies cannot read go to the kernel that reads everything."""
    query, key, value, scores = tensors(device="cpu")
    assert chosen(narrowed(query), narrowed(key), value, scores) == SIMT
    assert chosen(query, key, narrowed(value), scores) == SIMT
    wide = tensors(width=264, device="cpu")
    assert chosen(*wide) == SIMT


def test_choice_does_not_depend_on_the_layout(on_cpu: None) -> None:
    query, key, value, scores = tensors(device="cpu")
    for change in (strided, shifted):
        assert chosen(change(query), change(key), value, scores) == SM90
        assert chosen(query, key, change(value), scores) == SM90
    fused = torch.empty(2, 50, 4, 192, dtype=BF16)
    assert chosen(*fused.chunk(3, -1), scores) == SM90
    expanded = torch.empty(2, 50, 1, 64, dtype=BF16).expand(-1, -1, 4, -1)
    assert chosen(query, expanded, expanded, scores[..., :1]) == SM90


def test_the_cpu_is_left_alone(gpu: Gpu) -> None:
    assert chosen(*tensors(device="cpu")) == CPU


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("operators", "capability", "changes", "fragments"),
    [
        (SM90, (8, 0), {}, ["capability >= (9, 0)", "(8, 0) (too old)"]),
        (SM90, (10, 0), {}, ["capability <= (9, 0)", "(10, 0) (too new)"]),
        (SM80, (7, 5), {}, ["capability >= (8, 0)", "cuda:0 has compute capability 7.5", BUILT_FOR]),
        (SIMT, (7, 5), {"dtype": F32}, ["capability >= (8, 0)", "rebuild with TORCH_CUDA_ARCH_LIST=7.5"]),
        (SIMT, (11, 0), {"dtype": F32}, ["cuda:0 has compute capability 11.0", "TORCH_CUDA_ARCH_LIST=11.0"]),
        (SM80, (9, 0), {"dtype": F32}, ["dtype=torch.float32"]),
        (SM80, (9, 0), {"width": 264}, ["> 256"]),
        (SM90, (9, 0), {"value_width": 60}, ["value has width 60, not a multiple of 8"]),
        (SM90, (9, 0), {"device": "cpu"}, ["device=cpu"]),
        (SIMT, (9, 0), {"device": "cpu"}, ["device=cpu"]),
        (CPU, (9, 0), {}, ["device=cuda"]),
        (
            SM90,
            (8, 0),
            {"dtype": F32, "width": 260, "value_width": 260},
            ["too old", "dtype=torch.float32", "> 128", "query has width 260", "value has width 260"],
        ),
    ],
    ids=str,
)
def test_refusals(operators: tuple, capability: tuple, changes: dict, fragments: list[str], gpu: Gpu) -> None:
    gpu(*capability)
    query, key, value, scores = tensors(**changes)
    for op in (operators, (operators[0], None), (None, operators[1])):
        if op[0] is None and (capability in ((7, 5), (11, 0)) or operators is SM90):
            continue  # the best forward operator does not fit either, and is asked first; Hopper has none for backward
        with pytest.raises(ValueError) as caught:
            xops.memory_efficient_attention(query, key, value, SparseKBias(scores, 8), op=op)
        for fragment in fragments:
            assert fragment in str(caught.value)


def test_refusal_lists_what_there_is_for_the_device(gpu: Gpu) -> None:
    query, key, value, _ = tensors()
    bad = SparseKBias(torch.empty(2, 50, 3, device="cuda"), 8)
    with pytest.raises(NotImplementedError, match="not a multiple of the 3 heads") as caught:
        xops.memory_efficient_attention(query, key, value, bad)
    for operator in FORWARD_OPERATORS:
        assert (f"`{operator.NAME}` is not supported" in str(caught.value)) == (operator is not CPU[0])


def test_function_refuses_a_gpu_without_code(gpu: Gpu) -> None:
    gpu(8, 7, built_for="9.0a 10.0+PTX")
    with pytest.raises(ValueError, match=r"compute capability 8\.7, and the CUDA operators were built for 9\.0a 10\.0"):
        sparsek_attention(*tensors(), 8)


# ----------------------------------------------------------------------------------------------------- what is called


class Calls(TorchDispatchMode):
    """Which kernels the operators are called with, in order: ``("forward", name of its kernel)``."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, str | None]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for name, count in (("forward", 14), ("backward", 17)):
            if function is getattr(torch.ops.xformers_sparsek, name).default:
                self.made.append((name, args[count - 1] if len(args) >= count else None))
        return function(*args, **(kwargs or {}))


FORWARD = [None, SM90[0], SM80[0], SIMT[0]]
BACKWARD = [None, SM90[1], SM80[1], SIMT[1]]


def kernel_of(op: type | None) -> str | None:
    return op and op.KERNEL


@pytest.mark.parametrize("is_5d", [False, True])
@pytest.mark.parametrize(
    ("forward", "backward"), list(itertools.product(FORWARD, BACKWARD)), ids=lambda op: op and op.NAME
)
def test_chosen_kernels_run(forward: type | None, backward: type | None, is_5d: bool, on_cpu: None) -> None:
    """Each with each; where none is named, the operators choose by themselves."""
    query, key, value, scores = tensors(device="cpu")
    if is_5d:
        query, key, value = (x.unflatten(2, (4, 1)) for x in (query, key, value))
    query.requires_grad_()
    with Calls() as calls:
        bias = SparseKBias(scores, 8)
        xops.memory_efficient_attention(query, key, value, bias, op=(forward, backward)).sum().backward()
    assert calls.made == [("forward", kernel_of(forward)), ("backward", kernel_of(backward))]


@pytest.mark.parametrize("is_5d", [False, True])
@pytest.mark.parametrize("named", [None, SM90, SM80, SIMT], ids=lambda op: op and op[0].NAME)
def test_chosen_kernels_run_without_autograd(named: tuple | None, is_5d: bool, on_cpu: None) -> None:
    *qkv, scores = tensors(device="cpu")
    if is_5d:
        qkv = [x.unflatten(2, (4, 1)) for x in qkv]
    bias, (forward, backward) = SparseKBias(scores, 8), named or (None, None)
    with Calls() as calls, torch.no_grad():
        xops.memory_efficient_attention_forward(*qkv, bias, op=forward)
        fmha.memory_efficient_attention_partial(*qkv, bias, op=forward)
        out, lse = xops.memory_efficient_attention_forward_requires_grad(*qkv, bias, op=forward)
        xops.memory_efficient_attention_backward(out, out, lse, *qkv, bias, op=backward)
    expected = kernel_of(forward or SM90[0]), kernel_of(backward or SM90[1])
    assert calls.made == 3 * [("forward", expected[0])] + [("backward", expected[1])]


def test_function_leaves_the_choice_to_the_operators(on_cpu: None) -> None:
    query, key, value, scores = tensors(device="cpu")
    query.requires_grad_()
    with Calls() as calls:
        sparsek_attention(query, key, value, scores, 8).sum().backward()
    assert calls.made == [("forward", None), ("backward", None)]
