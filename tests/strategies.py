"""What Hypothesis draws: whole attention problems, described by a few numbers and a seed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import tally
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = (F64, F32, BF16, F16)
LAYOUTS = ("contiguous", "transposed", "strided", "fused", "shared batch", "shared heads")
CONTINUOUS = ("normal", "rising", "falling")
FINITE = (*CONTINUOUS, "tied", "integers")
INFINITE = ("some excluded", "some pinned", "too many pinned", "all excluded", "integers and infinities")
KINDS = ("normal", "normal", *FINITE, *INFINITE)
SIZES = ("tiny", "small", "medium", "large")


@dataclass(frozen=True)
class Inputs:
    """The tensors of a problem. They require no gradient; whoever differentiates makes leaves of them."""

    query: Tensor  # [B, Mq, H, K]
    key: Tensor  # [B, Mk, G, K]
    value: Tensor  # [B, Mk, G, Kv]
    scores: Tensor  # [B, Mk, G]
    grad_out: Tensor  # [B, Mq, H, Kv]
    grad_lse: Tensor | None  # [B, H, Mq]
    cu_seqlens: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Problem:
    """One attention call: shapes, options, and how its tensors are filled and laid out."""

    lengths: tuple[tuple[int, int], ...]  # (Mq, Mk) of each packed sequence, or one pair
    packed: bool
    batch: int
    groups: int
    ratio: int
    width: int
    value_width: int
    dtype: torch.dtype
    score_dtype: torch.dtype
    kind: str
    spread: float
    num_keys: int
    window: int
    causal: bool
    hard: bool
    scale: float | None
    sharpness: float
    layouts: tuple[str, str, str, str, str]  # of query, key, value, scores and the gradient of the output
    lse_grad: bool
    seed: int

    @property
    def queries(self) -> int:
        return sum(mq for mq, _ in self.lengths)

    @property
    def keys(self) -> int:
        return sum(mk for _, mk in self.lengths)

    @property
    def heads(self) -> int:
        return self.groups * self.ratio

    @property
    def factor(self) -> float:
        return self.width**-0.5 if self.scale is None else self.scale

    @property
    def options(self) -> dict:
        return {"window": self.window, "causal": self.causal, "hard": self.hard, "scale": self.scale}

    def inputs(self, device: torch.device | str = "cpu") -> Inputs:
        """The tensors; the same for the same problem."""
        gen = torch.Generator().manual_seed(self.seed)
        b, mq, mk, h, g = self.batch, self.queries, self.keys, self.heads, self.groups
        shapes = [(b, mq, h, self.width), (b, mk, g, self.width), (b, mk, g, self.value_width)]
        layouts = self.layouts
        factors = (self.sharpness, 1.0, 1.0)
        tensors = [
            _normal(gen, s, self.dtype, y, device, f) for s, y, f in zip(shapes, layouts[:3], factors, strict=True)
        ]
        grad_out = _normal(gen, (b, mq, h, self.value_width), self.dtype, layouts[4], device)
        wide = F64 if self.dtype == F64 else F32
        grad_lse = _normal(gen, (b, h, mq), wide, "contiguous", device) if self.lse_grad else None
        scores = _scores(gen, (b, g, mk), self.kind, self.spread, self.num_keys).to(self.score_dtype).to(device)
        if layouts[3] == "contiguous":
            scores = scores.transpose(1, 2).contiguous()
        elif layouts[3] == "strided":
            scores = torch.stack([scores, -scores], -1).transpose(1, 2)[..., 0]
        else:
            scores = scores.transpose(1, 2)
        return Inputs(*tensors, scores, grad_out, grad_lse, self._cu_seqlens(device))

    def _cu_seqlens(self, device: torch.device | str) -> tuple[Tensor, Tensor] | None:
        if not self.packed:
            return None
        lengths = torch.tensor([(0, 0), *self.lengths])
        ends = lengths.cumsum(0).to(torch.int32).to(device)
        return ends[:, 0].contiguous(), ends[:, 1].contiguous()


def _normal(
    gen: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype, layout: str, device, factor: float = 1.0
) -> Tensor:
    """Numbers from N(0, factor^2) in one of the layouts; the memory is filled first and then viewed, on the device."""

    def fill(*size: int) -> Tensor:
        return (torch.randn(size, generator=gen, dtype=F64) * factor).to(dtype).to(device)

    if layout == "contiguous":
        return fill(*shape)
    b, m, h, k = shape
    if layout == "transposed":
        return fill(b, h, m, k).transpose(1, 2)
    if layout == "strided":
        return fill(b, 2 * m + 1, h, 2 * k)[:, 1::2, :, ::2]
    if layout == "fused":
        return fill(b, m, 3, h, k)[:, :, 1]
    if layout == "shared batch":
        return fill(min(b, 1), m, h, k).expand(shape)
    if layout == "shared heads":
        return fill(b, m, 1, k).expand(shape)
    assert layout == "constant"  # the gradient that out.sum().backward() sends
    return fill(1, 1, 1, 1).expand(shape)


def _scores(gen: torch.Generator, shape: tuple[int, int, int], kind: str, spread: float, num_keys: int) -> Tensor:
    """Scores ``[B, G, Mk]`` in float64."""
    draw = torch.rand(shape, generator=gen, dtype=F64)
    normal = torch.randn(shape, generator=gen, dtype=F64) * spread
    integers = torch.randint(-3, 4, shape, generator=gen).to(F64)
    pins = min(1.0, 0.6 * num_keys / max(1, shape[-1]))
    if kind in ("rising", "falling"):
        return normal.sort(-1, descending=kind == "falling").values
    if kind == "tied":
        return torch.full(shape, spread, dtype=F64)
    if kind == "integers":
        return integers
    if kind == "some excluded":
        return normal.masked_fill(draw < 0.3, -torch.inf)
    if kind == "some pinned":
        return normal.masked_fill(draw < pins, torch.inf)
    if kind == "too many pinned":
        return normal.masked_fill(draw < 3 * pins, torch.inf)
    if kind == "all excluded":
        return torch.full(shape, -torch.inf, dtype=F64)
    if kind == "integers and infinities":
        return integers.masked_fill(draw < 0.2, -torch.inf).masked_fill(draw > 1 - pins, torch.inf)
    assert kind == "normal"
    return normal


def _pairs(size: str) -> st.SearchStrategy[tuple[int, int]]:
    """Numbers of queries and keys: equal, or fewer or more queries than keys."""
    if size == "large":  # crosses many tiles of the operator, within what the dense reference can bear
        return st.one_of(
            st.integers(1100, 1600).map(lambda n: (n, n)),
            st.tuples(st.integers(100, 600), st.integers(1500, 2500)),
            st.tuples(st.integers(1100, 1500), st.integers(300, 1000)),
        )
    low, high = {"tiny": (0, 8), "small": (0, 40), "medium": (100, 400)}[size]
    equal = st.integers(low, high).map(lambda n: (n, n))
    queries = st.one_of(st.just(1), st.integers(min(low, 1), high), st.integers(min(low, 1), high))
    return st.one_of(equal, equal, st.tuples(queries, st.integers(low, high)))


@st.composite
def problems(
    draw: st.DrawFn,
    *,
    dtypes: Sequence[torch.dtype] = DTYPES,
    kinds: Sequence[str] = KINDS,
    sizes: Sequence[str] = SIZES,
    packed: bool | None = None,
    causal: bool | None = None,
    hard: bool | None = None,
    spreads: Sequence[float] = (1.0, 4.0, 16.0, 0.1, 1000.0),
) -> Problem:
    """Problems of every sort, limited to the given ones."""
    size = draw(st.sampled_from([s for s, n in zip(SIZES, (5, 8, 9, 2), strict=True) if s in sizes for _ in range(n)]))
    in_one = draw(st.sampled_from([False, False, True])) if packed is None else packed
    if in_one and size != "large":
        lengths = draw(
            st.lists(_pairs(size), min_size=0 if size == "tiny" else 1, max_size=5 if size != "medium" else 3)
        )
    else:
        lengths = [draw(_pairs(size))]
        if in_one:
            lengths += draw(st.lists(_pairs("small"), max_size=2))
    longest = max([mk for _, mk in lengths], default=0)
    is_causal = draw(st.sampled_from([True, True, False])) if causal is None else causal
    dtype = draw(st.sampled_from(dtypes))
    wide = size in ("tiny", "small")
    widths = st.sampled_from([1, 2, 8, 16, 33, 64] if size != "large" else [1, 4, 8])
    share = st.sampled_from([0.03, 0.1, 0.3, 0.6, 0.9, 1.1])
    window = st.one_of(st.just(0), st.integers(1, 4), st.integers(0, longest + 3))
    return Problem(
        lengths=tuple(lengths),
        packed=in_one,
        batch=1 if in_one or size == "large" else draw(st.integers(1, 3 if wide else 2)),
        groups=1 if size == "large" else draw(st.integers(1, 3 if wide else 2)),
        ratio=draw(st.sampled_from([1, 2, 3, 4, 6] if wide else [1, 2, 3, 4] if size == "medium" else [1, 2, 4])),
        width=draw(widths),
        value_width=draw(widths),
        dtype=dtype,
        score_dtype=draw(st.sampled_from([d for d in (dtype, dtype, F32, BF16, F16) if d != F64 or dtype == F64])),
        kind=draw(st.sampled_from(kinds)),
        spread=draw(st.sampled_from(spreads)),
        num_keys=draw(st.one_of(st.integers(1, 4), share.map(lambda x: max(1, int(x * longest))))),
        window=draw(window) if is_causal else 0,
        causal=is_causal,
        hard=draw(st.sampled_from([False, False, True])) if hard is None else hard,
        scale=draw(st.sampled_from([None, None, 0.3, -0.5, 0.0])),
        sharpness=draw(st.sampled_from([1.0, 1.0, 6.0])),
        layouts=(
            *(draw(st.sampled_from(LAYOUTS)) for _ in range(3)),
            draw(st.sampled_from(["contiguous", "transposed", "strided"])),
            draw(st.sampled_from([*LAYOUTS, "constant"])),
        ),
        lse_grad=draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
    )


def law(share: float = 1.0, **drawn: st.SearchStrategy) -> Callable:
    """A property test over ``drawn``, with ``share`` of the examples of the chosen profile, counted in the summary."""

    def decorate(test: Callable) -> Callable:
        @settings(max_examples=max(5, int(settings.default.max_examples * share)))
        @given(**drawn)
        @functools.wraps(test)
        def run(*args, **kwargs):
            with tally.case(f"{test.__module__}::{test.__name__}"):
                test(*args, **kwargs)
                tally.checked("passed")

        return run

    return decorate
