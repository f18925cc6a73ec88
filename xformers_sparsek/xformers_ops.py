"""Everything that touches xFormers: the operators, their registration, and the hooks into its dispatcher.

xFormers up to 0.0.35 has its own ``fmha`` code; later versions re-export ``mslk.attention.fmha``. The modules that own
the code are therefore looked up from the functions themselves. Without xFormers this module only offers a stand-in for
its bias class.
"""

from __future__ import annotations

import functools
import sys
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import problem
from ._library import unavailable

if TYPE_CHECKING:
    from .bias import SparseKBias

try:
    import xformers.ops as xops

    if not hasattr(xops, "memory_efficient_attention"):  # what xFormers after 0.0.35 does without mslk
        raise ImportError("xformers.ops has no memory_efficient_attention: is mslk installed?")
    _core: ModuleType = sys.modules[xops.memory_efficient_attention.__module__]
    _common: ModuleType = sys.modules[_core.Inputs.__module__]
    _dispatch: ModuleType = sys.modules[_core._dispatch_fw.__module__]
    AttentionBias = _core.AttentionBias
except (ImportError, OSError) as error:
    #: Why xFormers is not there, or None.
    MISSING: Exception | None = error

    class AttentionBias:
        """Stands in for xFormers' class where xFormers is not installed."""
else:
    MISSING = None


def register(bias_type: type[SparseKBias]) -> None:
    """Adds the operators to xFormers and hooks its dispatcher; does nothing without xFormers, nor a second time."""
    if MISSING is not None:
        return
    for operator, all_operators in ((FwOp, _core.ALL_FW_OPS), (BwOp, _core.ALL_BW_OPS)):
        operator.SUPPORTED_ATTN_BIAS_TYPES = (bias_type,)
        _replace(all_operators, operator)
        _replace(xops.common.OPERATORS_REGISTRY, operator)
    if getattr(_core._memory_efficient_attention, "bias_type", None) is bias_type:
        return
    _dispatch._run_priority_list = _hooked_priority_list(_dispatch._run_priority_list, bias_type)
    _core._memory_efficient_attention = _hooked_attention(_core._memory_efficient_attention, bias_type)
    _core._memory_efficient_attention_backward = _hooked_backward(_core._memory_efficient_attention_backward, bias_type)


def _replace(operators: list[type], operator: type) -> None:
    """Appends ``operator``, or puts it in the place of the one of its name that an earlier import left."""
    for index, other in enumerate(operators):
        if other.NAME == operator.NAME:
            operators[index] = operator
            return
    operators.append(operator)


def _hooked_priority_list(inner, bias_type: type):
    """xFormers' choice of an operator, offering ours, and only ours, for our bias."""

    @functools.wraps(inner)
    def run_priority_list(name, priority_list, inp, *args, **kwargs):
        if type(inp.attn_bias) is bias_type:
            priority_list = [BwOp] if "backward" in name else [FwOp]
        return inner(name, priority_list, inp, *args, **kwargs)

    return run_priority_list


def _hooked_attention(inner, bias_type: type):
    """The entry to xFormers' autograd function, which our bias goes round.

    That function knows no gradient of a bias, and none of 5-D inputs. Our operators have derivatives of their own.
    """

    @functools.wraps(inner)
    def memory_efficient_attention(inp, op=None):
        if type(inp.attn_bias) is not bias_type:
            return inner(inp, op=op)
        _refuse(inp, op)
        folded = _Folded(inp)
        out, _ = folded.run(inp.output_dtype)
        return folded.unfold_heads(out)

    memory_efficient_attention.bias_type = bias_type
    return memory_efficient_attention


def _hooked_backward(inner, bias_type: type):
    """The entry to the backward operators, which refuses 5-D gradients, whatever the operator."""

    @functools.wraps(inner)
    def memory_efficient_attention_backward(ctx, inp, grad, op=None, **kwargs):
        if type(inp.attn_bias) is not bias_type or not inp.query.ndim == grad.ndim == ctx.out.ndim == 5:
            return inner(ctx, inp, grad, op=op, **kwargs)
        _refuse(inp, (None, op))
        return BwOp.apply(ctx, inp, grad)

    return memory_efficient_attention_backward


def _refuse(inp, op: tuple | None) -> None:
    """Raises what xFormers raises for inputs, or operators chosen by hand, that do not fit."""
    inp.validate_inputs()
    forward, backward = op or (None, None)
    if forward is None:
        _dispatch._dispatch_fw(inp, True)
    else:
        _dispatch._ensure_op_supports_or_raise(ValueError, "memory_efficient_attention", forward, inp)
    if backward is not None:
        _dispatch._ensure_op_supports_or_raise(ValueError, "memory_efficient_attention_backward", backward, inp)


def _layout_reasons(inp) -> list[str]:
    """Reasons against the shapes in xFormers' layout, before heads are folded."""
    bias, tensors = inp.attn_bias, (inp.query, inp.key, inp.value)
    if inp.query.ndim not in (4, 5) or any(x.ndim != inp.query.ndim for x in tensors):
        return [f"query, key and value must all be 4-D or 5-D, got {[tuple(x.shape) for x in tensors]}"]
    if bias.scores.ndim != 3:
        return [f"scores must have shape [B, Mk, G], got {tuple(bias.scores.shape)}"]
    groups = bias.scores.shape[-1]
    if inp.query.ndim == 5 and groups != inp.query.shape[2]:
        return [f"scores have {groups} heads, query has {inp.query.shape[2]} head groups"]
    if inp.query.ndim == 4 and (groups == 0 or inp.query.shape[2] % groups):
        return [f"query has {inp.query.shape[2]} heads, not a multiple of the {groups} heads of scores"]
    return []


class _Folded:
    """A call in xFormers' layout (4-D or 5-D), seen in the layout of :func:`xformers_sparsek.sparsek_attention`.

    Where key and value are expanded along the heads of a group, they are folded to one head per group, which the
    operators share among its queries. Where they are not, every head keeps its own and the scores are repeated.
    """

    def __init__(self, inp) -> None:
        self.bias: SparseKBias = inp.attn_bias
        self.is_5d = inp.query.ndim == 5
        self.groups = self.bias.scores.shape[-1]
        query, key, value = inp.query, inp.key, inp.value
        if self.is_5d:
            self.ratio = query.shape[3]
            self.shared = self.ratio == 1 or key.stride(3) == value.stride(3) == 0
            query = query.flatten(2, 3)
            key, value = (x[:, :, :, 0] if self.shared else x.flatten(2, 3) for x in (key, value))
        else:
            self.ratio = query.shape[2] // self.groups
            self.shared = self.ratio == 1 or key.stride(2) == value.stride(2) == 0
            if self.shared and self.ratio > 1:
                key, value = key[:, :, : self.groups], value[:, :, : self.groups]
        self.query, self.key, self.value = query, key, value
        self.scores = self.bias.scores if self.shared else self.bias.scores.repeat_interleave(self.ratio, -1)
        if query.dtype == torch.float64:
            self.scores = self.scores.double()
        self.scale = inp.scale

    def reasons(self) -> list[str]:
        bias = self.bias
        return problem.attention_reasons(
            self.query,
            self.key,
            self.value,
            self.scores,
            bias.k,
            bias.window,
            self.scale,
            bias.cu_seqlens_q,
            bias.cu_seqlens_k,
        )

    def options(self) -> tuple:
        """What the forward and the backward operator take after their tensors."""
        bias = self.bias
        scale = self.query.shape[-1] ** -0.5 if self.scale is None else float(self.scale)
        return bias.cu_seqlens_q, bias.cu_seqlens_k, bias.window, bias.causal, bias.hard, scale

    def select(self) -> tuple[Tensor, Tensor]:
        """Threshold and expiry."""
        bias = self.bias
        problem.refuse("SparseKBias", {"scores": bias.scores}, problem.value_reasons(bias.scores))
        return torch.ops.xformers_sparsek.select(
            self.scores.detach(),
            bias.cu_seqlens_q,
            bias.cu_seqlens_k,
            self.query.shape[1],
            bias.k,
            bias.window,
            bias.causal,
            bias.hard,
        )

    def run(self, out_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        threshold, expiry = self.select()
        return torch.ops.xformers_sparsek.forward(
            self.query, self.key, self.value, self.scores, threshold, expiry, *self.options(), out_dtype
        )

    def unfold_heads(self, x: Tensor, dim: int = 2) -> Tensor:
        """Splits dimension ``dim`` of ``H`` heads into groups and heads per group, for 5-D calls."""
        return x.unflatten(dim, (self.groups, self.ratio)) if self.is_5d else x

    def unfold_gradient(self, grad: Tensor) -> Tensor:
        """The gradient of key or value in xFormers' layout.

        An expanded tensor is one memory seen several times, so only the sum over its heads means anything: each head
        gets an equal part of it.
        """
        if not self.shared or self.ratio == 1:
            return self.unfold_heads(grad)
        part = (grad / self.ratio).unsqueeze(3).expand(-1, -1, -1, self.ratio, -1)
        return part if self.is_5d else part.flatten(2, 3)


if MISSING is None:
    # Refusals of xFormers' base classes that do not concern operators that bring their own library.
    _FOREIGN_REASONS = ("xFormers wasn't build with CUDA support", "bf16 is only supported on")

    class _Support:
        """What both directions support, and every reason against a set of inputs."""

        OPERATOR = True
        SUPPORTED_DEVICES = {"cpu"}
        SUPPORTED_DTYPES = set(problem.DTYPES)
        SUPPORTED_MAX_K = float("inf")
        SUPPORTED_MIN_K = 1
        SUPPORTED_ATTN_BIAS_TYPES: tuple[type, ...] = ()
        SUPPORTS_DROPOUT = False
        SUPPORTS_CUSTOM_SCALE = True
        SUPPORTS_DIFFERENT_VALUE_EMBED = True
        SUPPORTS_OUTPUT_DTYPE = True
        SUPPORTS_PARTIAL = True
        SUPPORTS_BMGHK = True
        IS_DETERMINISTIC = True

        @classmethod
        def is_available(cls) -> bool:
            return all(unavailable(device) is None for device in cls.SUPPORTED_DEVICES)

        @classmethod
        def not_supported_reasons(cls, d) -> list[str]:
            reasons = [r for r in super().not_supported_reasons(d) if not r.startswith(_FOREIGN_REASONS)]
            if type(d.attn_bias) not in cls.SUPPORTED_ATTN_BIAS_TYPES:
                return reasons
            if getattr(d, "quantize_pv_to_fp8", False) or getattr(d, "quantize_qk_to_fp8", False):
                reasons.append("quantization to float8 is not supported")
            layout = _layout_reasons(d)
            return reasons + (layout or _Folded(d).reasons())

    class FwOp(_Support, _common.AttentionFwOpBase):
        """SparseK attention forward on the CPU."""

        NAME = "sparsekF-cpu"

        @classmethod
        def apply(cls, inp, needs_gradient: bool):
            folded = _Folded(inp)
            out, lse = folded.run(inp.get_output_dtype())
            if not needs_gradient:
                return folded.unfold_heads(out), None
            out, lse = folded.unfold_heads(out), folded.unfold_heads(lse, dim=1)
            return out, _common.Context(lse=lse, out=out, op_bw=BwOp)

    class BwOp(_Support, _common.AttentionBwOpBase):
        """SparseK attention backward on the CPU."""

        NAME = "sparsekB-cpu"

        @classmethod
        def apply(cls, ctx, inp, grad: Tensor):
            folded = _Folded(inp)
            if inp.attn_bias.scores.requires_grad and torch._C._current_graph_task_id() != -1:
                raise RuntimeError(
                    "this entry point of xFormers gives no gradient to the scores of a SparseKBias: "
                    "call memory_efficient_attention, or detach the scores"
                )
            threshold, expiry = folded.select()
            heads = (lambda x, dim: x.flatten(dim, dim + 1)) if folded.is_5d else (lambda x, dim: x)
            dq, dk, dv, _ = torch.ops.xformers_sparsek.backward(
                heads(grad, 2),
                None,
                folded.query,
                folded.key,
                folded.value,
                folded.scores,
                heads(ctx.out, 2),
                heads(ctx.lse, 1),
                threshold,
                expiry,
                *folded.options(),
            )
            return _common.Gradients(
                dq=folded.unfold_heads(dq), dk=folded.unfold_gradient(dk), dv=folded.unfold_gradient(dv)
            )
