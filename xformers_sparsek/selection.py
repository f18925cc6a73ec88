"""The SparseK operator: Euclidean projection of scores onto the capped simplex."""

from __future__ import annotations

import torch
from torch import Tensor


def sparsek(scores: Tensor, k: int, dim: int = -1) -> Tensor:
    """Differentiable top-k: gates in [0, 1] that sum to ``k`` along ``dim``.

    Projects the scores ``u`` onto the capped simplex (Lou et al., arXiv:2406.16747, section 3.2):
    ``clip(u - tau, 0, 1)`` with the threshold ``tau`` such that the gates sum to ``k``. With no more than ``k``
    candidates every gate is 1. Differentiable any number of times; the Jacobian on the fractional set
    ``F = {0 < gate < 1}`` is ``I - 11^T / |F|`` and zero elsewhere.

    Args:
        scores: floating-point tensor of any shape. ``-inf`` is no candidate (gate 0), ``+inf`` is pinned (gate 1,
            counted towards ``k``; with ``k`` or more pinned entries exactly those are kept). NaN gives NaN gates in
            its own slice.
        k: how many entries to keep, at least 1.
        dim: the dimension that is projected.

    Returns:
        Gates with the shape and dtype of ``scores``.

    Raises:
        ValueError: ``k`` is not an integer of at least 1, or ``scores`` is not a floating-point tensor of at least
            one dimension.
    """
    reasons = count_reasons("k", k, minimum=1)
    if not isinstance(scores, Tensor) or not scores.dtype.is_floating_point or scores.ndim == 0:
        what = f"{scores.dtype} of shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        reasons.append(f"scores must be a floating-point tensor of at least one dimension, got {what}")
    if reasons:
        raise ValueError("sparsek: " + "; ".join(reasons))
    u = scores.movedim(dim, -1)
    if u.numel() == 0:
        return scores.clone()
    return _gates(u.double(), k).to(scores.dtype).movedim(-1, dim)


def count_reasons(name: str, value: object, minimum: int) -> list[str]:
    """Why ``value`` is no integer of at least ``minimum``: a list of no or one reason."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        return [f"{name} must be an integer, got {value!r}"]
    if value < minimum:
        return [f"{name} must be at least {minimum}, got {value}"]
    if isinstance(value, int) and value >= 2**63:
        return [f"{name} must be at most 2^63 - 1, got {value}"]
    return []


def _gates(u: Tensor, k: int) -> Tensor:
    """Gates of float64 scores along the last dimension."""
    with torch.no_grad():
        pinned = u == torch.inf
        finite = torch.isfinite(u)
        free = (k - pinned.sum(-1, keepdim=True)).clamp(min=0)  # what the unpinned candidates share
        crowded = finite.sum(-1, keepdim=True) > free
        lower, upper, at_upper = _bracket(u, finite, free)
        # No breakpoint lies between the two, so the fractional set is the same all the way from one to the other.
        # Where scores are so large that u - 1 rounds to u, ties at the upper breakpoint still share what is left.
        between = (u >= upper) & ((u - 1 <= lower) | (u == upper))
        fractional = finite & crowded & (free > 0) & torch.where(at_upper, (u > upper) & (u - 1 < upper), between)
        saturated = finite & ~fractional & (~crowded | ((free > 0) & (u >= upper) & ~(at_upper & (u == upper))))
        size = fractional.sum(-1, keepdim=True).clamp(min=1).to(u.dtype)
        share = (free - saturated.sum(-1, keepdim=True)) / size
        kept = (saturated | pinned).to(u.dtype)
        invalid = u.isnan().any(-1, keepdim=True)
    # Written with differentiable sums over constant sets, so that autograd finds the Jacobian by itself.
    inside = torch.where(fractional, u, 0.0)
    gates = torch.where(fractional, inside - inside.sum(-1, keepdim=True) / size + share, kept)
    return torch.where(invalid, torch.nan, gates.clamp(0, 1))


def _bracket(u: Tensor, finite: Tensor, free: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The two neighbouring breakpoints around the threshold: gates sum to more than ``free`` at the lower one only.

    Also whether the upper one is the threshold itself: the gates that are just 0 or 1 there are not fractional.

    An entry enters the fractional set where the threshold is ``u - 1`` and leaves it at ``u``. The sum of the gates
    falls from one breakpoint to the next, so a binary search over the sorted breakpoints finds the pair. Each step sums
    numbers in [0, 1], which loses nothing to cancellation, however far the scores are apart.
    """
    known = torch.where(finite, u, 0.0)
    breakpoints = torch.cat([torch.where(finite, u - 1, torch.inf), torch.where(finite, u, torch.inf)], -1)
    breakpoints = breakpoints.sort(-1).values
    count = 2 * finite.sum(-1, keepdim=True)
    low = torch.zeros_like(count)  # the sum exceeds `free` here: all gates are 1 at the first breakpoint
    high = (count - 1).clamp(min=0)  # and is 0 at the last

    def gate_sum(threshold: Tensor) -> Tensor:
        return torch.where(finite, (known - threshold).clamp(0, 1), 0.0).sum(-1, keepdim=True)

    for _ in range(max(1, (2 * u.shape[-1]).bit_length())):
        middle = (low + high) // 2
        exceeds = gate_sum(breakpoints.gather(-1, middle)) > free
        low = torch.where(exceeds, middle, low)
        high = torch.where(exceeds, high, middle)
    upper = breakpoints.gather(-1, high)
    return breakpoints.gather(-1, low), upper, gate_sum(upper) == free
