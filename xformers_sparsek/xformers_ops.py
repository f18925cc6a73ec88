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

from . import _library, problem
from .attention import attend, scale_of, select

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
    for operators, all_operators in ((FORWARD_OPERATORS, _core.ALL_FW_OPS), (BACKWARD_OPERATORS, _core.ALL_BW_OPS)):
        for operator in operators:
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
    """xFormers' choice of an operator, offering ours, and only ours, for our bias: the first one that fits.

    Operators of other devices are left out, so that a refusal speaks of those that the caller can mean.
    """

    @functools.wraps(inner)
    def run_priority_list(name, priority_list, inp, *args, **kwargs):
        if type(inp.attn_bias) is bias_type:
            ours = BACKWARD_OPERATORS if "backward" in name else FORWARD_OPERATORS
            priority_list = [op for op in ours if inp.query.device.type in op.SUPPORTED_DEVICES] or list(ours)
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
        forward, backward = op or (None, None)
        inp.validate_inputs()
        _supported_forward(inp, forward)
        if backward is not None:
            _supported_backward(inp, backward)
        folded = _fold(inp)
        # Where nothing is named, the C++ operators choose, by the rule that the dispatcher was just asked for.
        kernels = (forward and forward.KERNEL, backward and backward.KERNEL)
        out, _ = folded.attend(inp.output_dtype, *kernels)
        return folded.unfold_heads(out)

    memory_efficient_attention.bias_type = bias_type
    return memory_efficient_attention


def _hooked_backward(inner, bias_type: type):
    """The entry to the backward operators, which refuses 5-D gradients, whatever the operator."""

    @functools.wraps(inner)
    def memory_efficient_attention_backward(ctx, inp, grad, op=None, **kwargs):
        if type(inp.attn_bias) is not bias_type or not inp.query.ndim == grad.ndim == ctx.out.ndim == 5:
            return inner(ctx, inp, grad, op=op, **kwargs)
        inp.validate_inputs()
        return _supported_backward(inp, op).apply(ctx, inp, grad)

    return memory_efficient_attention_backward


def _supported_forward(inp, op: type | None) -> type:
    """The forward operator chosen by hand or else the best one; raises what xFormers raises where it does not fit."""
    if op is None:
        return _dispatch._dispatch_fw(inp, True)
    _dispatch._ensure_op_supports_or_raise(ValueError, "memory_efficient_attention", op, inp)
    return op


def _supported_backward(inp, op: type | None) -> type:
    if op is None:
        return _dispatch._dispatch_bw(inp, varlen_lse_packed=None)
    _dispatch._ensure_op_supports_or_raise(ValueError, "memory_efficient_attention_backward", op, inp)
    return op


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
        self.scale = inp.scale

    @property
    def pattern(self) -> tuple:
        bias = self.bias
        return bias.k, bias.window, bias.causal, bias.hard, bias.cu_seqlens_q, bias.cu_seqlens_k

    def reasons(self) -> list[str]:
        num_keys, window, _, _, *lengths = self.pattern
        tensors = (self.query, self.key, self.value, self.scores)
        return problem.attention_reasons(*tensors, num_keys, window, self.scale, *lengths)

    def attend(
        self, out_dtype: torch.dtype | None, forward_kernel: str | None, backward_kernel: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Output and LSE."""
        self._refuse_values()
        return attend(
            self.query,
            self.key,
            self.value,
            self.scores,
            *self.pattern,
            scale_of(self.query, self.scale),
            out_dtype=out_dtype,
            forward_kernel=forward_kernel,
            backward_kernel=backward_kernel,
        )

    def differentiate(self, grad: Tensor, out: Tensor, lse: Tensor, kernel: str | None) -> tuple[Tensor, ...]:
        """Gradients of query, key and value."""
        self._refuse_values()
        scores, threshold, expiry = select(self.query, self.scores, *self.pattern)
        _, window, causal, hard, *lengths = self.pattern
        options = (*lengths, window, causal, hard, scale_of(self.query, self.scale))
        tensors = (self.query, self.key, self.value, scores, out, lse, threshold, expiry)
        return torch.ops.xformers_sparsek.backward(grad, None, *tensors, *options, kernel)[:3]

    def _refuse_values(self) -> None:
        problem.refuse("SparseKBias", {"scores": self.bias.scores}, problem.value_reasons(self.bias.scores))

    def fold_heads(self, x: Tensor, dim: int) -> Tensor:
        return x.flatten(dim, dim + 1) if self.is_5d else x

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


def _fold(inp) -> _Folded:
    """``inp`` folded, once for the dispatcher's questions and the call itself."""
    if not hasattr(inp, "sparsek_folded"):
        inp.sparsek_folded = _Folded(inp)
    return inp.sparsek_folded


if MISSING is None:
    # Refusals of xFormers' base classes that do not concern operators that bring their own library.
    _FOREIGN_REASONS = ("xFormers wasn't build with CUDA support", "bf16 is only supported on")

    class _Kernel:
        """What a kernel supports, in both directions, and every reason against a set of inputs."""

        KERNEL: str | None = None  # what the C++ operators call it
        OPERATOR = True
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
            return all(_library.unavailable(device) is None for device in cls.SUPPORTED_DEVICES)

        @classmethod
        def not_supported_reasons(cls, d) -> list[str]:
            reasons = [r for r in super().not_supported_reasons(d) if not r.startswith(_FOREIGN_REASONS)]
            if type(d.attn_bias) not in cls.SUPPORTED_ATTN_BIAS_TYPES:
                return reasons
            if getattr(d, "quantize_pv_to_fp8", False) or getattr(d, "quantize_qk_to_fp8", False):
                reasons.append("quantization to float8 is not supported")
            layout = _layout_reasons(d)
            return reasons + (layout or _fold(d).reasons() + cls.width_reasons(_fold(d)))

        @classmethod
        def width_reasons(cls, folded: _Folded) -> list[str]:
            """Reasons against the widths of query and value."""
            return []

    class Cpu(_Kernel):
        """The kernel for the CPU."""

        SUPPORTED_DEVICES = {"cpu"}

    class Simt(_Kernel):
        """Plain CUDA cores: every dtype, width and stride, exact rather than fast."""

        KERNEL = "simt"
        SUPPORTED_DEVICES = {"cuda"}
        CUDA_MINIMUM_COMPUTE_CAPABILITY = (8, 0)

    class Sm80(Simt):
        """Tensor cores by mma.sync, on every GPU from compute capability 8.0."""

        KERNEL = "sm80"
        SUPPORTED_DTYPES = {torch.bfloat16, torch.float16}
        SUPPORTED_MAX_K = 256

        @classmethod
        def width_reasons(cls, folded: _Folded) -> list[str]:
            """Rows are copied by 16 bytes, that is 8 elements, at a time."""
            widths = {"query": folded.query.shape[-1], "value": folded.value.shape[-1]}
            return [f"{name} has width {width}, not a multiple of 8" for name, width in widths.items() if width % 8]

    class Sm90(Sm80):
        """Hopper's tensor cores, by wgmma."""

        KERNEL = "sm90"
        SUPPORTED_MAX_K = 128
        CUDA_MINIMUM_COMPUTE_CAPABILITY = CUDA_MAXIMUM_COMPUTE_CAPABILITY = (9, 0)

        @classmethod
        def is_available(cls) -> bool:
            return super().is_available() and any(x[1:] == (9, 0) for x in _library.ARCHITECTURES)

    class Decode(Sm80):
        """Tensor cores for few queries, as in generation, with the keys shared out among the multiprocessors."""

        KERNEL = "decode"
        SUPPORTED_MAX_K = 128
        MAX_QUERIES = 8

        @classmethod
        def width_reasons(cls, folded: _Folded) -> list[str]:
            reasons, queries = super().width_reasons(folded), folded.query.shape[1]
            if folded.bias.cu_seqlens_q is not None:
                reasons.append("packed sequences are for other kernels")
            elif queries > cls.MAX_QUERIES:
                reasons.append(f"query has {queries} queries, more than {cls.MAX_QUERIES}")
            return reasons

    class _Forward(_common.AttentionFwOpBase):
        @classmethod
        def apply(cls, inp, needs_gradient: bool):
            folded = _fold(inp)
            out, lse = folded.attend(inp.get_output_dtype(), cls.KERNEL)
            if not needs_gradient:
                return folded.unfold_heads(out), None
            return folded.unfold_heads(out), _common.Context(
                lse=folded.unfold_heads(lse, 1), out=folded.unfold_heads(out)
            )

    class _Backward(_common.AttentionBwOpBase):
        @classmethod
        def apply(cls, ctx, inp, grad: Tensor):
            folded = _fold(inp)
            if inp.attn_bias.scores.requires_grad and torch._C._current_graph_task_id() != -1:
                raise RuntimeError(
                    "this entry point of xFormers gives no gradient to the scores of a SparseKBias: "
                    "call memory_efficient_attention, or detach the scores"
                )
            grad, out, lse = (folded.fold_heads(x, dim) for x, dim in ((grad, 2), (ctx.out, 2), (ctx.lse, 1)))
            dq, dk, dv = folded.differentiate(grad, out, lse, cls.KERNEL)
            return _common.Gradients(
                dq=folded.unfold_heads(dq), dk=folded.unfold_gradient(dk), dv=folded.unfold_gradient(dv)
            )

    def _operators(kernel: type[_Kernel]) -> tuple[type, type]:
        """The forward and the backward operator of ``kernel``, as xFormers takes them for ``op``."""
        name = kernel.KERNEL or "cpu"
        forward = type(f"{kernel.__name__}FwOp", (kernel, _Forward), {"NAME": f"sparsekF-{name}"})
        return forward, type(f"{kernel.__name__}BwOp", (kernel, _Backward), {"NAME": f"sparsekB-{name}"})

    SM90, SM80, SIMT, CPU = (_operators(kernel) for kernel in (Sm90, Sm80, Simt, Cpu))
    #: Forward for few queries, with the portable gradients.
    DECODE = (_operators(Decode)[0], SM80[1])
    # Best first: the first one that supports the inputs is taken. `choose_kernel` of csrc/cuda/common/kernels.cpp goes
    # by the same order and conditions, so that what xFormers reports is what runs.
    FORWARD_OPERATORS = tuple(operators[0] for operators in (DECODE, SM90, SM80, SIMT, CPU))
    BACKWARD_OPERATORS = tuple(operators[1] for operators in (SM90, SM80, SIMT, CPU))
