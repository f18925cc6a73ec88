"""The attention bias that selects keys by learned scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import problem
from .selection import sparsek
from .xformers_ops import AttentionBias


class SparseKBias(AttentionBias):
    """``bias[i, j] = log m[i, j]`` with the SparseK gates ``m``: 0 for a gate of 1, ``-inf`` for a gate of 0.

    Passed as ``attn_bias`` to ``xformers.ops.memory_efficient_attention``; see
    :func:`xformers_sparsek.sparsek_attention` for what is computed. The scores receive gradients through that call.

    Args:
        scores: ``[B, Mk, G]``, one score per key and key/value head (arXiv:2406.16747, section 3.1). In a 4-D call
            ``G`` divides the number of heads, and each run of ``H / G`` heads shares its scores; in a 5-D call ``G`` is
            the number of head groups.
        k: how many candidates each query keeps (the sum of their gates), at least 1.
        window: how many of the latest keys each query keeps besides.
        causal: whether a query sees only keys up to its own position (bottom-right aligned).
        hard: gates of 0 and 1 only; see :func:`xformers_sparsek.sparsek_attention`.
        cu_seqlens: packed sequences: int32 ``[sequences + 1]`` cumulative lengths, or a pair for queries and keys.

    Raises:
        ValueError: naming every reason why the arguments are not supported.
    """

    def __init__(
        self,
        scores: Tensor,
        k: int,
        window: int = 0,
        *,
        causal: bool = True,
        hard: bool = False,
        cu_seqlens: Tensor | tuple[Tensor, Tensor] | None = None,
    ) -> None:
        pair = problem.length_pair(cu_seqlens)
        reasons = problem.pattern_reasons(scores, k, window, *pair) + problem.flag_reasons(window, causal, hard)
        arguments = {"scores": scores, "k": k, "window": window, "causal": causal, "hard": hard}
        problem.refuse("SparseKBias", arguments | {"cu_seqlens": cu_seqlens}, reasons)
        self.scores = scores
        self.k = k
        self.window = window
        self.causal = causal
        self.hard = hard
        self.cu_seqlens_q, self.cu_seqlens_k = pair

    @classmethod
    def from_seqlens(
        cls, scores: Tensor, k: int, q_seqlen: Sequence[int], kv_seqlen: Sequence[int] | None = None, **options
    ) -> SparseKBias:
        """The bias for packed sequences of the given lengths, as xFormers' block-diagonal biases are made.

        Args:
            scores: ``[1, sum(kv_seqlen), G]``.
            k: as for the class.
            q_seqlen: number of queries of each sequence; zero is allowed.
            kv_seqlen: number of keys of each sequence; as many as queries by default.
            options: ``window``, ``causal`` and ``hard``, as for the class.

        Raises:
            ValueError: as for the class.
        """
        ends = [_cumulative(q_seqlen, scores.device)]
        ends.append(ends[0] if kv_seqlen is None else _cumulative(kv_seqlen, scores.device))
        return cls(scores, k, cu_seqlens=(ends[0], ends[1]), **options)

    def materialize(
        self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> Tensor:
        """The dense bias: the reference that every operator is tested against. Differentiable in the scores.

        Args:
            shape: ``(B, H, Mq, Mk)``, or ``(B, G, heads per group, Mq, Mk)`` for 5-D calls.
            dtype: of the result; the gates are computed in float64.
            device: of the result.

        Raises:
            ValueError: ``shape`` does not fit the scores or the packed lengths.
        """
        gates = self._gates(shape).to(device)
        kept = gates > 0
        # The logarithm sees 1 where the gate is 0, so that no gradient meets 0 * inf.
        bias = torch.where(kept, torch.where(kept, gates, 1.0).log(), -torch.inf).to(dtype)
        heads = shape[1] if len(shape) == 4 else shape[1] * shape[2]
        return bias.repeat_interleave(heads // bias.shape[1], 1).reshape(shape)

    def _gates(self, shape: tuple[int, ...]) -> Tensor:
        """Dense gates ``[B, G, Mq, Mk]`` in float64."""
        batch, keys, groups = self.scores.shape
        queries = shape[-2]
        if len(shape) not in (4, 5) or shape[0] != batch or shape[-1] != keys or shape[1] % groups:
            raise ValueError(f"a bias with scores {tuple(self.scores.shape)} has no shape {tuple(shape)}")
        scores = self.scores.double().transpose(1, 2)
        if self.cu_seqlens_q is None:
            return self._sequence_gates(scores, queries)
        starts_q, starts_k = self.cu_seqlens_q.tolist(), self.cu_seqlens_k.tolist()
        if starts_q[-1] != queries:
            raise ValueError(f"packed sequences with {starts_q[-1]} queries have no bias of shape {tuple(shape)}")
        gates = scores.new_zeros(batch, groups, queries, keys)
        for q0, q1, k0, k1 in zip(starts_q, starts_q[1:], starts_k, starts_k[1:]):
            gates[:, :, q0:q1, k0:k1] = self._sequence_gates(scores[:, :, k0:k1], q1 - q0)
        return gates

    def _sequence_gates(self, scores: Tensor, queries: int) -> Tensor:
        """Gates of one sequence with ``scores [B, G, Mk]``."""
        keys = scores.shape[-1]
        position = torch.arange(queries, device=scores.device).unsqueeze(-1) + keys - queries
        index = torch.arange(keys, device=scores.device)
        if self.causal:
            candidate = index <= position - self.window
            latest = (index <= position) & ~candidate
        else:
            candidate = torch.ones(queries, keys, dtype=torch.bool, device=scores.device)
            latest = ~candidate
        masked = torch.where(candidate, scores.unsqueeze(-2), -torch.inf)
        gates = sparsek(masked, self.k)
        if self.hard:
            chosen = _highest(masked.detach(), self.k)
            gates = torch.where(chosen, 1 + gates - gates.detach(), 0.0)
        return torch.where(latest, 1.0, gates)

    def __repr__(self) -> str:
        packed = "" if self.cu_seqlens_q is None else f", {self.cu_seqlens_q.shape[0] - 1} packed sequences"
        return (
            f"SparseKBias(scores {tuple(self.scores.shape)}, k={self.k}, window={self.window}, "
            f"causal={self.causal}, hard={self.hard}{packed})"
        )


def _highest(scores: Tensor, k: int) -> Tensor:
    """The ``k`` highest entries of the last dimension that are not -inf, lower index first; all +inf are among them."""
    rank = scores.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
    return ((rank < k) & (scores > -torch.inf)) | (scores == torch.inf)


def _cumulative(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
