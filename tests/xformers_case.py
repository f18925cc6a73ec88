"""Calls of xFormers' attention with a SparseKBias, and the dense computation that they must equal."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import xformers.ops as xops
from torch import Tensor

from xformers_sparsek import SparseKBias

Results = dict[str, Tensor]


@dataclasses.dataclass
class Case:
    """One call: ``query``, ``key`` and ``value`` are 5-D; key and value have one head per group where ``expanded``."""

    query: Tensor  # [B, Mq, G, R, K]
    key: Tensor  # [B, Mk, G, R or 1, K]
    value: Tensor  # [B, Mk, G, R or 1, Kv]
    scores: Tensor  # [B, Mk, G]
    grad: Tensor  # of the output, in the layout of the call
    is_5d: bool
    options: dict
    scale: float | None

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("query", "key", "value", "scores")}

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value as xFormers takes them."""
        ratio = self.query.shape[3]
        views = (self.query, *(x.expand(-1, -1, -1, ratio, -1) for x in (self.key, self.value)))
        return views if self.is_5d else tuple(_merge_heads(x) for x in views)

    def bias(self) -> SparseKBias:
        return SparseKBias(self.scores, **self.options)

    def differentiable(self, *names: str) -> Case:
        """A copy on fresh leaves, of which those named (all by default) require gradients."""
        fresh = {name: x.detach().clone() for name, x in self.leaves.items()}
        for name in names or fresh:
            fresh[name].requires_grad_()
        return dataclasses.replace(self, **fresh)

    def double(self) -> Case:
        leaves = {name: x.double() for name, x in self.leaves.items()}
        return dataclasses.replace(self, **leaves, grad=self.grad.double())

    def grads(self) -> Results:
        return {name: x.grad for name, x in self.leaves.items() if x.grad is not None}


def make(
    *,
    dtype: torch.dtype = torch.float64,
    score_dtype: torch.dtype | None = None,
    batch: int = 2,
    queries: int = 37,
    keys: int = 37,
    groups: int = 2,
    ratio: int = 1,
    width: int = 8,
    value_width: int = 8,
    is_5d: bool = False,
    expanded: bool = False,
    scale: float | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    **options,
) -> Case:
    """A random case, the same on every device; ``options`` go to SparseKBias."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(to).to(device)

    if score_dtype is None:
        score_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    heads = 1 if expanded else ratio
    shape = (batch, queries, groups, ratio, value_width)
    return Case(
        query=normal(batch, queries, groups, ratio, width),
        key=normal(batch, keys, groups, heads, width),
        value=normal(batch, keys, groups, heads, value_width),
        # As far apart as the gates' width, so that saturated, fractional and dropped keys all occur.
        scores=normal(batch, keys, groups, to=score_dtype) * 2,
        grad=normal(*(shape if is_5d else (batch, queries, groups * ratio, value_width))),
        is_5d=is_5d,
        options={"k": 9, **options},
        scale=scale,
    )


def _merge_heads(x: Tensor) -> Tensor:
    """4-D from 5-D, as a view where one head is expanded to all; ``flatten`` would copy."""
    batch, length, groups, ratio, width = x.shape
    if groups == 1 and x.stride(3) == 0:
        return x[:, :, 0]
    return x.reshape(batch, length, groups * ratio, width)


def dense(query: Tensor, key: Tensor, value: Tensor, bias: SparseKBias, scale: float | None) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp ``[B, H, Mq]`` by the dense bias; a query without keys gives 0 and -inf."""
    q, k, v = (x.flatten(2, -2).transpose(1, 2) for x in (query, key, value))
    mask = bias.materialize((*q.shape[:3], k.shape[2]), dtype=q.dtype, device=q.device)
    logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale) + mask
    empty = (mask == -torch.inf).all(-1, keepdim=True)
    weights = logits.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    out = (weights @ v).transpose(1, 2)
    return out.reshape(*query.shape[:-1], value.shape[-1]), logits.detach().logsumexp(-1)


def attend(case: Case, op: tuple | None = None, **options) -> Tensor:
    """The call under test."""
    return xops.memory_efficient_attention(*case.tensors(), case.bias(), scale=case.scale, op=op, **options)


def attend_dense(case: Case) -> Tensor:
    return dense(*case.tensors(), case.bias(), case.scale)[0]


def results(case: Case, function: Callable[[Case], Tensor]) -> Results:
    """The output of ``function`` and the gradients of all leaves."""
    case = case.differentiable()
    out = function(case)
    out.backward(case.grad.to(out.dtype))
    return {"out": out.detach(), **case.grads()}


def check(case: Case, function: Callable[[Case], Tensor] = attend) -> Results:
    """Output and all four gradients of ``function`` must be those of the dense computation."""
    actual = results(case, function)
    compare(case, actual, results(case.double(), attend_dense), results(case, attend_dense))
    assert {name: x.dtype for name, x in actual.items() if name != "out"} == {
        n: x.dtype for n, x in case.leaves.items()
    }
    return actual


def compare(case: Case, actual: Results, exact: Results, rough: Results) -> None:
    """At most twice the error that ``rough``, PyTorch's own dense computation in the same dtype, has, plus rounding."""
    assert actual.keys() == exact.keys()
    # Sums of some fifty products, and logarithms of small gates, round more than a 16-bit result that is stored once.
    units = {torch.float64: 1e5, torch.float32: 32}.get(case.query.dtype, 2) * torch.finfo(case.query.dtype).eps
    for name, expected in exact.items():
        got = actual[name]
        assert got.shape == expected.shape, name
        allowed = 2 * _distance(rough[name], expected) + units * expected.abs().max().item()
        assert _distance(got, expected) <= allowed, f"{name}: {_distance(got, expected)} > {allowed}"


def _distance(a: Tensor, b: Tensor) -> float:
    assert torch.isfinite(a).all()
    return (a.double() - b.double()).abs().max().item()
