"""SparseK attention as a function, and what PyTorch must know about the C++ operators below it."""

from __future__ import annotations

import torch
from torch import Tensor

from . import problem
from ._library import UNAVAILABLE


def sparsek_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    num_keys: int,
    *,
    window: int = 0,
    causal: bool = True,
    hard: bool = False,
    scale: float | None = None,
    cu_seqlens: Tensor | tuple[Tensor, Tensor] | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which each query sees about ``num_keys`` keys, chosen by learned scores.

    Computes ``softmax(scale * q k^T + log m) v`` with the gates ``m`` of :func:`xformers_sparsek.sparsek` over each
    query's candidates (Lou et al., arXiv:2406.16747, section 3), in time and memory linear in the sequence length.
    Query ``i`` sits at position ``p = i + Mk - Mq``. Causal: keys ``p - window + 1 .. p`` always have gate 1, whatever
    their scores, and the candidates are keys ``0 .. p - window``. Not causal: all keys are candidates of every query.

    Args:
        query: ``[B, Mq, H, K]`` in float64, float32, bfloat16 or float16.
        key: ``[B, Mk, G, K]``; ``H`` is a multiple of ``G`` and query head ``h`` uses key/value head ``h * G // H``.
        value: ``[B, Mk, G, Kv]``.
        scores: ``[B, Mk, G]``, one score per key and key/value head; ``-inf`` is no candidate, ``+inf`` is pinned.
            Any of the dtypes above; float64 only with a float64 query.
        num_keys: how many candidates each query keeps (the sum of their gates), at least 1.
        window: how many of the latest keys each query keeps besides, with gate 1. Only with ``causal``.
        causal: whether a query sees only keys up to its own position.
        hard: gates are 1 for the ``num_keys`` highest scores (the lower index wins ties) and 0 elsewhere; gradients to
            the scores then use the Jacobian of the soft gates, applied to the gates of the selected keys.
        scale: factor of ``q k^T``; ``K ** -0.5`` by default.
        cu_seqlens: packed sequences, each on its own: int32 ``[sequences + 1]`` cumulative lengths for queries and keys
            alike, or a pair of them; ``B`` is 1 then.
        return_lse: also return the log-sum-exp of each query's logits, gates included; it is differentiable.

    Returns:
        ``out [B, Mq, H, Kv]`` in the dtype of ``query``, and with ``return_lse`` also ``lse [B, H, Mq]`` (natural
        logarithm; float64 for float64 inputs, else float32). A query without keys gives 0 and ``-inf``.

    Raises:
        ValueError: an argument is not supported; the message names every reason, with the shapes. NaN scores are one on
            the CPU (under ``torch.compile`` a RuntimeError from the operator); elsewhere NaN scores give NaN outputs in
            their own batch entry and head.
    """
    cu_seqlens_q, cu_seqlens_k = problem.length_pair(cu_seqlens)
    reasons = problem.attention_reasons(query, key, value, scores, num_keys, window, scale, cu_seqlens_q, cu_seqlens_k)
    reasons += problem.flag_reasons(window, causal, hard)
    if not reasons:
        reasons = problem.value_reasons(scores)
    if reasons:
        arguments = {"query": query, "key": key, "value": value, "scores": scores, "num_keys": num_keys}
        arguments |= {"window": window, "causal": causal, "hard": hard, "scale": scale, "cu_seqlens": cu_seqlens}
        problem.refuse("sparsek_attention", arguments, reasons)

    out, lse = attend(
        query, key, value, scores, num_keys, window, causal, hard, cu_seqlens_q, cu_seqlens_k, scale_of(query, scale)
    )
    return (out, lse) if return_lse else out


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    num_keys: int,
    window: int,
    causal: bool,
    hard: bool,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    *,
    out_dtype: torch.dtype | None = None,
    forward_kernel: str | None = None,
    backward_kernel: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Selection and attention of arguments that were found good: out and LSE.

    ``forward_kernel`` and ``backward_kernel`` name what runs; None takes the best (csrc/schema.cpp).
    """
    pattern = (num_keys, window, causal, hard, cu_seqlens_q, cu_seqlens_k)
    scores, threshold, expiry = select(query, scores, *pattern)
    options = (cu_seqlens_q, cu_seqlens_k, window, causal, hard, scale)
    return torch.ops.xformers_sparsek.forward(
        query, key, value, scores, threshold, expiry, *options, out_dtype, forward_kernel, backward_kernel
    )


def select(
    query: Tensor,
    scores: Tensor,
    num_keys: int,
    window: int,
    causal: bool,
    hard: bool,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The scores as the operators take them, float64 exactly if query is, with threshold and expiry."""
    if query.dtype == torch.float64:
        scores = scores.double()
    threshold, expiry = torch.ops.xformers_sparsek.select(
        scores.detach(), cu_seqlens_q, cu_seqlens_k, query.shape[1], num_keys, window, causal, hard
    )
    return scores, threshold, expiry


def scale_of(query: Tensor, scale: float | None) -> float:
    """The factor of ``q k^T``."""
    return query.shape[-1] ** -0.5 if scale is None else float(scale)


def _fake_select(scores, cu_seqlens_q, cu_seqlens_k, num_queries, num_keys, window, causal, hard):
    batch, keys, groups = scores.shape
    threshold = scores.new_empty(batch, groups, num_queries, dtype=_accumulator(scores))
    return threshold, scores.new_empty(batch, groups, keys, dtype=torch.int32)


def _fake_forward(
    query,
    key,
    value,
    scores,
    threshold,
    expiry,
    cu_seqlens_q,
    cu_seqlens_k,
    window,
    causal,
    hard,
    scale,
    out_dtype,
    *_,
):
    batch, queries, heads, _ = query.shape
    out = query.new_empty(batch, queries, heads, value.shape[-1], dtype=out_dtype or query.dtype)
    return out, query.new_empty(batch, heads, queries, dtype=_accumulator(query))


def _fake_append(key, value, scores, key_cache, value_cache, score, *_):
    return score.new_empty(*score.shape[:2], 1), score.new_empty(score.shape, dtype=torch.int32)


def _fake_backward(grad_out, grad_lse, query, key, value, scores, *_):
    return tuple(x.new_empty(x.shape) for x in (query, key, value, scores))


def _save_for_backward(ctx, inputs, output):
    query, key, value, scores, threshold, expiry, cu_seqlens_q, cu_seqlens_k, *options, _, _, backward_kernel = inputs
    ctx.save_for_backward(query, key, value, scores, *output, threshold, expiry, cu_seqlens_q, cu_seqlens_k)
    ctx.options = (*options, backward_kernel)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_lse):
    query, key, value, scores, out, *rest = ctx.saved_tensors
    if grad_out is None and grad_lse is None:
        return (None,) * 15
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = torch.ops.xformers_sparsek.backward(grad_out, grad_lse, query, key, value, scores, out, *rest, *ctx.options)
    return (*grads, *(None,) * 11)


def _no_second_backward(ctx, *grads):
    raise NotImplementedError("the gradients of SparseK attention cannot be differentiated again")


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _register() -> None:
    """Tells PyTorch the shapes and derivatives of the operators; once per process, even if imported again."""
    operators = torch.ops.xformers_sparsek
    if getattr(operators.forward, "has_python_registrations", False):
        return
    torch.library.register_fake("xformers_sparsek::select", _fake_select)
    torch.library.register_fake("xformers_sparsek::forward", _fake_forward)
    torch.library.register_fake("xformers_sparsek::backward", _fake_backward)
    torch.library.register_fake("xformers_sparsek::append", _fake_append)
    torch.library.register_autograd("xformers_sparsek::forward", _backward, setup_context=_save_for_backward)
    torch.library.register_autograd("xformers_sparsek::backward", _no_second_backward)
    operators.forward.has_python_registrations = True


if UNAVAILABLE["cpu"] is None:
    _register()
