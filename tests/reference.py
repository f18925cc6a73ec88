"""Dense references, and how far an operator may be from them.

``Reference`` is attention in float64 over the dense bias of ``SparseKBias.materialize``, with gradients by autograd.
Its ``check`` compares an operator's results:

* float32 and float64: each element is within a few times the error that rounding can cause in it. That bound follows
  the formulas with absolute values: each weight is off by its exponent's rounding and, where the gate is fractional, by
  the threshold's; both carry on to whatever the weight enters.
* 16-bit types: beyond that, which float32 causes, by at most twice the largest error of the same computation in
  PyTorch in that dtype, and two units of rounding.
"""

from __future__ import annotations

import functools
from fractions import Fraction

import tally
import torch
from strategies import BF16, F16, F32, F64, Inputs, Problem
from torch import Tensor

from xformers_sparsek import SparseKBias, sparsek_attention

GRADS = ("dq", "dk", "dv", "dscores")
QUANTITIES = ("out", "lse", *GRADS)
MARGIN = 4.0  # how many times the modelled rounding error passes
Results = dict[str, Tensor]


def bias_of(problem: Problem, inputs: Inputs, scores: Tensor, hard: bool | None = None) -> SparseKBias:
    hard = problem.hard if hard is None else hard
    return SparseKBias(
        scores, problem.num_keys, problem.window, causal=problem.causal, hard=hard, cu_seqlens=inputs.cu_seqlens
    )


def operator(problem: Problem, inputs: Inputs) -> Results:
    """What ``sparsek_attention`` gives: output, LSE, and the gradients of query, key, value and scores."""
    leaves = [x.detach().requires_grad_() for x in (inputs.query, inputs.key, inputs.value, inputs.scores)]
    out, lse = sparsek_attention(
        *leaves, problem.num_keys, cu_seqlens=inputs.cu_seqlens, return_lse=True, **problem.options
    )
    assert out.dtype == problem.dtype and lse.dtype == (F64 if problem.dtype == F64 else F32)
    grads = _gradients(out, lse, leaves, inputs)
    for leaf, grad in zip(leaves, grads, strict=True):
        assert grad.shape == leaf.shape and grad.dtype == leaf.dtype
    return dict(zip(QUANTITIES, (out.detach(), lse.detach(), *grads), strict=True))


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``softmax(scale q k^T + bias) v`` and its LSE, with ``bias [B, G, Mq, Mk]``; a query without keys: 0 and -inf."""
    ratio = query.shape[2] // key.shape[2]
    key, value, bias = (
        key.repeat_interleave(ratio, 2),
        value.repeat_interleave(ratio, 2),
        bias.repeat_interleave(ratio, 1),
    )
    logits = torch.einsum("bihd,bjhd->bhij", query, key) * scale + bias
    alive = (bias > -torch.inf).any(-1, keepdim=True)
    logits = torch.where(alive, logits, 0.0)
    weights = logits.softmax(-1) * alive
    if logits.shape[-1] == 0:  # logsumexp over nothing is refused
        lse = logits.new_full(logits.shape[:-1], -torch.inf)
    else:
        lse = torch.where(alive.squeeze(-1), logits.logsumexp(-1), -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", weights, value), lse


def _gradients(out: Tensor, lse: Tensor, leaves: list[Tensor], inputs: Inputs) -> tuple[Tensor, ...]:
    results, grads = [out], [inputs.grad_out.to(out.dtype)]
    if inputs.grad_lse is not None and lse.requires_grad:
        results, grads = [out, lse], [*grads, inputs.grad_lse.to(lse.dtype)]
    return torch.autograd.grad(results, leaves, grads, materialize_grads=True, retain_graph=True)


class Pattern:
    """Which keys are candidates of which query, written from the contract and not from the package."""

    def __init__(self, problem: Problem, device: torch.device | str) -> None:
        def numbers(values) -> Tensor:
            return torch.tensor(list(values), dtype=torch.int64, device=device)

        lengths = problem.lengths
        self.row_sequence = numbers(s for s, (mq, _) in enumerate(lengths) for _ in range(mq))
        self.key_sequence = numbers(s for s, (_, mk) in enumerate(lengths) for _ in range(mk))
        self.position = numbers(i + mk - mq for mq, mk in lengths for i in range(mq))
        self.index = numbers(j for _, mk in lengths for j in range(mk))
        row, key = self.position.unsqueeze(-1), self.index
        same = self.row_sequence.unsqueeze(-1) == self.key_sequence
        if problem.causal:
            self.candidate = same & (key <= row - problem.window)
            self.latest = same & (key <= row) & ~self.candidate
        else:
            self.candidate, self.latest = same, torch.zeros_like(same)

    def slices(self, problem: Problem) -> list[tuple[slice, slice]]:
        """Rows and keys of each sequence."""
        slices, q0, k0 = [], 0, 0
        for mq, mk in problem.lengths:
            slices.append((slice(q0, q0 + mq), slice(k0, k0 + mk)))
            q0, k0 = q0 + mq, k0 + mk
        return slices


class Reference:
    """Dense float64 results of a problem, with what is needed to judge others by them."""

    def __init__(self, problem: Problem, inputs: Inputs) -> None:
        self.problem, self.inputs = problem, inputs
        self.eps = torch.finfo(F64 if problem.dtype == F64 else F32).eps
        self.pattern = Pattern(problem, inputs.query.device)
        self.scores = inputs.scores.detach().double().transpose(1, 2)  # [B, G, Mk]
        self._leaf = inputs.scores.detach().double().requires_grad_()
        shape = (problem.batch, problem.groups, problem.queries, problem.keys)
        self._bias = bias_of(problem, inputs, self._leaf).materialize(shape, F64, self._leaf.device)
        self.gates = self._bias.detach().exp()  # [B, G, Mq, Mk]
        self.soft = self.gates
        if problem.hard:
            soft = bias_of(problem, inputs, self._leaf.detach(), hard=False)
            self.soft = soft.materialize(shape, F64, self._leaf.device).exp()
        self.competing = self.pattern.candidate & self.scores.isfinite().unsqueeze(-2)
        self.fractional = self.competing & (self.soft > 0) & (self.soft < 1)
        self._find_thresholds()

    @functools.cached_property
    def exact(self) -> Results:
        """Output, LSE and gradients in float64."""
        return self.in_pytorch(F64)

    def in_pytorch(self, dtype: torch.dtype) -> Results:
        """The same computation in ``dtype``, over the dense bias in that dtype."""
        x = self.inputs
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x.query, x.key, x.value)]
        out, lse = attend(*leaves, self._bias.to(dtype), self.problem.factor)
        grads = _gradients(out, lse, [*leaves, self._leaf], x)
        return dict(zip(QUANTITIES, (out.detach(), lse.detach(), *grads), strict=True))

    def _find_thresholds(self) -> None:
        """Thresholds ``[B, G, Mq]`` as intervals, their rounding errors, and the candidates on a kink of a gate."""
        u, m = self.scores.unsqueeze(-2), self.soft
        count = self.fractional.sum(-1)
        mean = torch.where(self.fractional, u - m, 0.0).sum(-1) / count.clamp(min=1)
        dropped = torch.where(self.competing & (m == 0), u, -torch.inf)
        saturated = torch.where(self.competing & (m == 1), u - 1, torch.inf)
        none = m.new_full((*m.shape[:-1], 1), torch.inf)
        self.low = torch.where(count > 0, mean, torch.cat([dropped, -none], -1).amax(-1))
        self.high = torch.where(count > 0, mean, torch.cat([saturated, none], -1).amin(-1))
        size = torch.maximum(self.low.nan_to_num(0, 0, 0).abs(), self.high.nan_to_num(0, 0, 0).abs())
        # In float64 the sums behind a threshold count; a float32 threshold is a rounded float64 one.
        total = torch.where(self.competing, u.abs(), 0.0).sum(-1) if self.problem.dtype == F64 else 0.0
        self.threshold_error = self.eps * (1 + size + total)
        near = 4 * self.threshold_error
        pinned_down = self.high - self.low <= near  # else the threshold can stay clear of both ends
        near = torch.where(pinned_down, near, -1.0).unsqueeze(-1)
        low, high = self.low.unsqueeze(-1), self.high.unsqueeze(-1)
        self.kinked = self.competing & (((u - low).abs() <= near) | ((u - 1 - high).abs() <= near))

    def room(self) -> float:
        """How far every candidate is from a kink of its gate, at least."""
        u, low, high = self.scores.unsqueeze(-2), self.low.unsqueeze(-1), self.high.unsqueeze(-1)
        # Without fractional gates, low and high are themselves a dropped score and a saturated one less 1.
        interval = (high - low).expand_as(self.soft)
        room = torch.where(
            self.fractional.any(-1, keepdim=True), torch.minimum((u - low).abs(), (u - 1 - high).abs()), interval
        )
        return room[self.competing].min().item() if self.competing.any() else torch.inf

    def check(self, got: Results, quantities: tuple[str, ...] = QUANTITIES) -> None:
        """Compares an operator's results by the rules above."""
        dtype = self.problem.dtype
        bounds, slack = self._bounds(self.eps)
        for name in quantities:
            exact, mine = self.exact[name], got[name]
            error = _distance(mine, exact)
            allowed = MARGIN * bounds[name] + torch.finfo(dtype).smallest_normal
            if name == "dscores":
                stored = torch.finfo(self.problem.score_dtype)
                allowed = allowed + slack + stored.eps * exact.abs() + stored.smallest_normal
            allowed = allowed + self.coarseness(name)
            # What may be beyond the largest number of its dtype may be infinite.
            beyond = (
                mine.isinf() & (mine.sign() == exact.sign()) & (exact.abs() + allowed > torch.finfo(mine.dtype).max)
            )
            wrong = ~(error <= allowed) & ~beyond
            if wrong.any():
                worst = torch.where(wrong, error / allowed.clamp(min=1e-300), 0.0).nan_to_num(torch.inf).argmax()
                where = [int(i) for i in torch.unravel_index(worst, error.shape)]
                raise AssertionError(
                    f"{name} is wrong in {int(wrong.sum())} of {wrong.numel()} elements, at {where}: got "
                    f"{mine[tuple(where)]}, exact {exact[tuple(where)]}, error {error[tuple(where)]} > "
                    f"{allowed[tuple(where)]}"
                )
            tally.checked(name)
        if "dscores" in quantities and slack.any():
            tally.checked("dscores with a gate on a kink")

    @functools.cached_property
    def _coarse(self) -> Results:
        return self.in_pytorch(self.problem.dtype)

    def coarseness(self, name: str) -> float:
        """How far a 16-bit result may be off because 16-bit weights were multiplied: twice as far as PyTorch's is."""
        if self.problem.dtype in (F32, F64) or name == "lse":  # LSE is float32 all the same
            return 0.0
        exact = self.exact[name]
        unit = torch.finfo(self.problem.dtype).eps * _largest(exact)
        return 2 * _largest(_distance(self._coarse[name], exact)) + 2 * unit

    def error_of(self, name: str) -> Tensor:
        """How far each element of a result may be off by rounding."""
        return MARGIN * self._bounds(self.eps)[0][name]

    def check_agreement(
        self,
        got: Results,
        other: Results,
        names: tuple[str, ...],
        part: dict | None = None,
        *,
        same_kernel: bool = True,
    ) -> None:
        """Compares ``got`` with ``part`` of another run of the operator that differs by the order of its sums alone.

        Without ``same_kernel``, 16-bit weights may be rounded relative to another maximum, too.
        """
        bounds, _ = self._bounds(self.eps)
        for name in names:
            where = (part or {}).get(name, ...)
            expected, bound = other[name][where], bounds[name][where]
            # Each of the two rounds to its dtype; half a unit in the reference's check is a whole one here.
            stored = torch.finfo(got[name].dtype)
            allowed = 2 * MARGIN * bound + stored.eps * (expected.abs() + got[name].abs()) + stored.smallest_normal
            if not same_kernel:
                allowed = allowed + self.coarseness(name)
            error = _distance(got[name], expected)
            assert (error <= allowed).all(), f"{name} differs by up to {error.max()}"
            tally.checked(name)

    def _bounds(self, eps: float) -> tuple[Results, Tensor]:
        """Rounding errors by element, and how far score gradients may jump where a gate sits on a kink."""
        p, x = self.problem, self.inputs
        query, key, value, grad = (t.detach().double() for t in (x.query, x.key, x.value, x.grad_out))
        key, value = (t.repeat_interleave(p.ratio, 2) for t in (key, value))

        def heads(t: Tensor) -> Tensor:  # [B, G, ...] -> [B, H, ...]
            return t.repeat_interleave(p.ratio, 1)

        def groups(t: Tensor) -> Tensor:  # sums the heads of a group
            return t.unflatten(1, (p.groups, p.ratio)).sum(2)

        lse = self.exact["lse"].unsqueeze(-1)
        alive = lse > -torch.inf
        gates, fractional, shift = heads(self.gates), heads(self.fractional), heads(self.threshold_error).unsqueeze(-1)
        logits = torch.einsum("bihd,bjhd->bhij", query, key) * p.factor
        terms = torch.einsum("bihd,bjhd->bhij", query.abs(), key.abs()) * abs(p.factor)
        reach = (gates > 0) | heads(self.competing)
        ratio = torch.where(reach & alive, (logits - torch.where(alive, lse, 0.0)).clamp(max=300).exp(), 0.0)  # P / m
        weight = ratio * gates
        shift = 0.0 * shift if p.hard else shift
        exponent = eps * (1 + _row_max(torch.where(gates > 0, terms, 0.0)))
        relative = exponent + shift * (ratio * fractional).sum(-1, keepdim=True)
        off = weight * relative + shift * ratio * fractional  # error of a weight
        # A sum of n terms is off by about sqrt(n) roundings.
        over_keys, over_rows = eps * max(1, p.keys) ** 0.5, eps * max(1, p.queries * p.ratio) ** 0.5
        glse = 0.0 if x.grad_lse is None else x.grad_lse.double().unsqueeze(-1)
        dweight = torch.einsum("bihd,bjhd->bhij", grad, value)
        dweight_abs = torch.einsum("bihd,bjhd->bhij", grad.abs(), value.abs())
        mean_abs = (weight * dweight_abs).sum(-1, keepdim=True)
        mean_off = (off * dweight_abs).sum(-1, keepdim=True) + over_keys * mean_abs
        if p.dtype in (BF16, F16):  # the mean comes from the output, as that is stored
            stored = torch.finfo(p.dtype).eps / 2
            mean_off = mean_off + stored * (grad * self.exact["out"]).abs().sum(-1).transpose(1, 2).unsqueeze(-1)
        total = dweight_abs + mean_abs + (0.0 if x.grad_lse is None else glse.abs())
        dlogit_off = (off * total + weight * (eps * total + mean_off)) * abs(p.factor)
        dlogit_abs = weight * total * abs(p.factor)
        dgate = torch.where(gates > 0, ratio, 0.0) if p.hard else ratio
        dgate_off = groups(dgate * (relative * total + eps * total + mean_off) + over_rows * dgate * total)
        dgate_true = groups(dgate * (dweight - (weight * dweight).sum(-1, keepdim=True) + glse))
        count = self.fractional.sum(-1, keepdim=True).clamp(min=1)
        inside = torch.where(self.fractional, dgate_off, 0.0)
        dscores_off = torch.where(self.fractional, inside + inside.sum(-1, keepdim=True) / count, 0.0).sum(-2)
        # What a key shares with others is a difference of float64 prefix sums over the queries: off by their size.
        shared = torch.where(self.fractional, groups(dgate * total), 0.0).sum((-2, -1)).unsqueeze(-1)
        dscores_off = dscores_off + torch.finfo(F64).eps * shared * self.fractional.any(-2)

        sure = self.fractional & ~self.kinked
        count = sure.sum(-1, keepdim=True)
        mean = torch.where(sure, dgate_true, 0.0).sum(-1, keepdim=True) / count.clamp(min=1)
        jump = torch.where(self.kinked, (dgate_true - mean).abs(), 0.0)
        spill = 2 * jump.sum(-1, keepdim=True) / count.clamp(min=1)
        slack = torch.where(self.kinked, jump + spill, torch.where(sure, spill, 0.0)).sum(-2)
        bounds = {
            "out": torch.einsum("bhij,bjhd->bihd", off + over_keys * weight, value.abs()),
            "lse": (relative + eps * torch.where(alive, lse.abs(), 0.0)).squeeze(-1),
            "dq": torch.einsum("bhij,bjhd->bihd", dlogit_off + over_keys * dlogit_abs, key.abs()),
            "dk": torch.einsum("bhij,bihd->bjhd", dlogit_off + over_rows * dlogit_abs, query.abs()),
            "dv": torch.einsum("bhij,bihd->bjhd", off + over_rows * weight, grad.abs()),
            "dscores": dscores_off.transpose(1, 2),
        }
        for name in ("dk", "dv"):
            bounds[name] = groups(bounds[name].transpose(1, 2)).transpose(1, 2)
        return bounds, slack.transpose(1, 2)


def _row_max(x: Tensor) -> Tensor:
    return x.amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)


def _largest(x: Tensor) -> float:
    finite = x[x.isfinite()].abs()
    return finite.max().item() if finite.numel() else 0.0


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """|a - b| in float64; 0 where both are the same infinity."""
    a, b = a.double(), b.double()
    return torch.where(a == b, 0.0, (a - b).abs())


def exact_gates(scores: list[float], k: int) -> tuple[list[Fraction], Fraction | float]:
    """Gates and threshold of one slice in exact arithmetic, by trying every breakpoint; -inf where all are kept."""
    pinned = scores.count(float("inf"))
    free = max(0, k - pinned)
    finite = [Fraction(u) for u in scores if abs(u) != float("inf")]

    def gates(tau: Fraction | float) -> list[Fraction]:
        ends = {float("inf"): Fraction(1), float("-inf"): Fraction(0)}
        return [ends[u] if u in ends else min(max(Fraction(u) - tau, Fraction(0)), Fraction(1)) for u in scores]

    if len(finite) <= free:
        return [Fraction(u > float("-inf")) for u in scores], float("-inf")
    if free == 0:
        return [Fraction(u == float("inf")) for u in scores], float("inf")
    points = sorted({v for u in finite for v in (u - 1, u)})
    # The sum of the gates falls along the breakpoints; it is linear between the last above `free` and the next.
    above = max(t for t in points if sum(gates(t)) - pinned > free)
    below = min(t for t in points if t > above)
    high, low = sum(gates(above)) - pinned, sum(gates(below)) - pinned
    tau = above + (high - free) * (below - above) / (high - low)
    return gates(tau), tau
