"""What the operators accept: every reason why a set of inputs is refused, in one place for all callers."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ._library import unavailable_on
from .selection import count_reasons

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def refuse(caller: str, arguments: Mapping[str, object], reasons: list[str]) -> None:
    """Raises one ValueError that names every reason and shows the arguments; does nothing without reasons."""
    if not reasons:
        return
    lines = [f"{caller} does not support these inputs:"]
    lines += [f"    {name:<12}: {_describe(value)}" for name, value in arguments.items()]
    lines += ["because:"] + [f"    - {reason}" for reason in reasons]
    raise ValueError("\n".join(lines))


def pattern_reasons(
    scores: object, num_keys: object, window: object, cu_seqlens_q: object, cu_seqlens_k: object
) -> list[str]:
    """Reasons against a selection pattern, whatever the queries are."""
    reasons = count_reasons("k", num_keys, minimum=1) + count_reasons("window", window, minimum=0)
    if not isinstance(scores, Tensor):
        return [*reasons, f"scores must be a tensor [B, Mk, G], got {type(scores).__name__}"]
    if _layout_reasons("scores", scores):
        return reasons + _layout_reasons("scores", scores)
    if scores.ndim != 3:
        reasons.append(f"scores must have shape [B, Mk, G], got {tuple(scores.shape)}")
    if scores.dtype not in DTYPES:
        reasons.append(f"scores have dtype {scores.dtype} (supported: {_names(DTYPES)})")
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        reasons.append("cu_seqlens must be given for queries and keys, or for neither")
    elif cu_seqlens_q is not None:
        reasons += _packed_reasons(scores, cu_seqlens_q, cu_seqlens_k)
    return reasons


def attention_reasons(
    query: object,
    key: object,
    value: object,
    scores: object,
    num_keys: object,
    window: object,
    scale: object,
    cu_seqlens_q: object,
    cu_seqlens_k: object,
) -> list[str]:
    """Reasons against one call, in the shapes of :func:`xformers_sparsek.sparsek_attention`."""
    reasons = pattern_reasons(scores, num_keys, window, cu_seqlens_q, cu_seqlens_k)
    if scale is not None and not _is_finite(scale):
        reasons.append(f"scale must be a finite number, got {scale!r}")
    tensors = {"query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            reasons.append(f"{name} must be a tensor, got {type(tensor).__name__}")
        elif _layout_reasons(name, tensor):
            reasons += _layout_reasons(name, tensor)
        elif tensor.ndim != 4:
            reasons.append(f"{name} must have 4 dimensions [batch, length, heads, width], got {tuple(tensor.shape)}")
    if not all(isinstance(x, Tensor) and not _layout_reasons("", x) for x in (*tensors.values(), scores)):
        return reasons
    reasons += _tensor_reasons(query, key, value, scores)
    if scores.ndim == 3 and query.ndim == key.ndim == value.ndim == 4:
        reasons += _shape_reasons(query, key, value, scores)
        if cu_seqlens_q is not None and not reasons and has_values(cu_seqlens_q):
            reasons += _coverage_reasons("cu_seqlens of the queries", cu_seqlens_q, query.shape[1])
    return reasons


def flag_reasons(window: object, causal: object, hard: object) -> list[str]:
    """Reasons against the options that are on or off."""
    flags = {"causal": causal, "hard": hard}
    reasons = [
        f"{name} must be True or False, got {flag!r}" for name, flag in flags.items() if not isinstance(flag, bool)
    ]
    return reasons + (["window needs causal=True"] if window and causal is False else [])


def length_pair(cu_seqlens: object) -> tuple[object, object]:
    """Cumulative lengths of queries and of keys, from a pair of them or one for both."""
    if isinstance(cu_seqlens, (tuple, list)) and len(cu_seqlens) == 2:
        return cu_seqlens[0], cu_seqlens[1]
    return cu_seqlens, cu_seqlens


def value_reasons(scores: Tensor) -> list[str]:
    """Reasons found in the contents of ``scores``; only where that does not wait for a device."""
    if has_values(scores) and torch.isnan(scores).any():
        return ["scores contain NaN"]
    return []


def has_values(tensor: Tensor) -> bool:
    """Whether the contents of ``tensor`` can be looked at here, without waiting for a device or breaking a trace."""
    if torch.compiler.is_compiling() or tensor.device.type != "cpu":
        return False
    return not isinstance(tensor, torch._subclasses.FakeTensor)


def _layout_reasons(name: str, tensor: Tensor) -> list[str]:
    """Reasons that forbid any further look: a nested tensor has no shape, and a sparse one no strides."""
    if tensor.is_nested or tensor.layout != torch.strided:
        return [f"{name} must be a dense tensor, got {'a nested one' if tensor.is_nested else tensor.layout}"]
    return []


def _is_finite(scale: object) -> bool:
    try:
        return isinstance(scale, (int, float, torch.SymFloat)) and math.isfinite(scale)
    except OverflowError:  # an integer that no float holds
        return False


def _tensor_reasons(query: Tensor, key: Tensor, value: Tensor, scores: Tensor) -> list[str]:
    reasons = []
    missing = unavailable_on(query.device)
    if missing:
        reasons.append(missing)
    if query.dtype not in DTYPES:
        reasons.append(f"query has dtype {query.dtype} (supported: {_names(DTYPES)})")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            reasons.append(f"{name} has dtype {tensor.dtype}, query has {query.dtype}")
    if scores.dtype == torch.float64 and query.dtype != torch.float64:
        reasons.append(f"scores are float64 but query is {query.dtype}: pass scores.float()")
    for name, tensor in (("key", key), ("value", value), ("scores", scores)):
        if tensor.device != query.device:
            reasons.append(f"{name} is on {tensor.device}, query on {query.device}")
    return reasons


def _shape_reasons(query: Tensor, key: Tensor, value: Tensor, scores: Tensor) -> list[str]:
    reasons = []
    batch, _, heads, width = query.shape
    _, keys, groups, _ = key.shape
    for name, tensor in (("key", key), ("value", value), ("scores", scores)):
        if tensor.shape[0] != batch:
            reasons.append(f"{name} has batch size {tensor.shape[0]}, query has {batch}")
    for name, tensor in (("value", value), ("scores", scores)):
        if tensor.shape[1] != keys:
            reasons.append(f"{name} has length {tensor.shape[1]}, key has {keys}")
        if tensor.shape[2] != groups:
            reasons.append(f"{name} has {tensor.shape[2]} heads, key has {groups}")
    if groups == 0 or heads == 0:
        reasons.append(f"query has {heads} heads and key has {groups}: both need at least one")
    elif heads % groups:
        reasons.append(f"query has {heads} heads, not a multiple of the {groups} heads of key")
    if key.shape[3] != width:
        reasons.append(f"key has width {key.shape[3]}, query has {width}")
    if width == 0 or value.shape[3] == 0:
        reasons.append(f"query has width {width} and value has {value.shape[3]}: both need at least one")
    if max(query.shape[1], keys) >= 2**31 - 1:
        reasons.append("sequences must be shorter than 2^31 - 1")
    return reasons


def _packed_reasons(scores: Tensor, cu_seqlens_q: object, cu_seqlens_k: object) -> list[str]:
    reasons = []
    for name, lengths in (("queries", cu_seqlens_q), ("keys", cu_seqlens_k)):
        if not isinstance(lengths, Tensor):
            reasons.append(f"cu_seqlens of the {name} must be an int32 tensor, got {type(lengths).__name__}")
            continue
        if lengths.dtype != torch.int32 or lengths.ndim != 1 or lengths.shape[0] < 1:
            reasons.append(
                f"cu_seqlens of the {name} must be int32 of shape [sequences + 1], "
                f"got {lengths.dtype} of shape {tuple(lengths.shape)}"
            )
        if lengths.device != scores.device:
            reasons.append(f"cu_seqlens of the {name} are on {lengths.device}, scores on {scores.device}")
    if scores.ndim == 3 and scores.shape[0] != 1:
        reasons.append(f"packed sequences need batch size 1, scores have shape {tuple(scores.shape)}")
    if reasons:
        return reasons
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        reasons.append(
            f"cu_seqlens name {cu_seqlens_q.shape[0] - 1} sequences of queries and {cu_seqlens_k.shape[0] - 1} of keys"
        )
    if scores.ndim == 3 and has_values(cu_seqlens_k):
        reasons += _coverage_reasons("cu_seqlens of the keys", cu_seqlens_k, scores.shape[1])
    return reasons


def _coverage_reasons(name: str, lengths: Tensor, total: int) -> list[str]:
    bounds = lengths.tolist()
    if bounds[0] != 0 or bounds[-1] != total or any(a > b for a, b in zip(bounds, bounds[1:])):
        return [f"{name} must rise from 0 to {total}, got {_shorten(bounds)}"]
    return []


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        if value.is_nested:
            return f"nested dtype={value.dtype} device={value.device}"
        return f"shape={tuple(value.shape)} dtype={value.dtype} device={value.device}"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(map(_describe, value)) + ")"
    return repr(value)


def _shorten(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else str(values[:7])[:-1] + f", ..., {values[-1]}]"


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
