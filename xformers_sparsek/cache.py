"""Generation in constant memory: a cache of the keys that can still be seen."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import problem
from .attention import scale_of, select
from .selection import count_reasons

_NEVER = 2**31 - 1  # the expiry of a key that is still seen


class _Sequence(NamedTuple):
    """Keys of one batch entry in their order."""

    key: Tensor  # [n, G, K]
    value: Tensor  # [n, G, Kv]
    scores: Tensor  # [n, G]; -inf: no key is there
    positions: Tensor  # [n, G], int32


class SparseKCache:
    """Keys and values of one layer, for generation with SparseK attention in memory that does not grow.

    Along a causal sequence thresholds never fall, so a key whose gate is 0 is never seen again: that is how SparseK
    (Lou et al., arXiv:2406.16747) generates in constant memory. What is kept is the keys with a gate above 0 and,
    whatever their scores, the latest ``window`` tokens. Attending through the cache gives what
    :func:`xformers_sparsek.sparsek_attention` gives on the whole sequence, for any division of it into calls, as long
    as the capacity suffices.

    Soft selection can need more keys than ``num_keys``: about a third more where scores have a standard deviation of 4,
    2.4 times as many at 1. Where more than ``capacity`` have a gate above 0, those with the smallest gates are dropped
    once their query has seen them, the latest first among equals; ``overflow`` counts them.

    Appending a token takes time that does not depend on how many came before, launches the same kernels every time and
    does not wait for the device: it can be captured in a CUDA graph. There are no gradients.

    Args:
        batch: batch size ``B``.
        num_groups: number of key/value heads ``G``.
        key_dim: width ``K`` of queries and keys.
        value_dim: width ``Kv`` of values; ``key_dim`` by default.
        num_keys: how many candidates each query keeps (the sum of their gates), at least 1.
        window: how many of the latest keys each query keeps besides, with gate 1.
        capacity: how many keys are kept besides the window, at least ``num_keys``; by default ``num_keys`` with
            ``hard`` and twice as many without.
        hard: gates are 1 for the ``num_keys`` highest scores and 0 elsewhere.
        dtype: of queries, keys and values: float64, float32, bfloat16 or float16.
        device: where the cache lives.

    Raises:
        ValueError: an argument is out of its range; the message names every reason.
    """

    def __init__(
        self,
        batch: int,
        num_groups: int,
        key_dim: int,
        value_dim: int | None = None,
        *,
        num_keys: int,
        window: int = 0,
        capacity: int | None = None,
        hard: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        value_dim = key_dim if value_dim is None else value_dim
        sizes = {"batch": batch, "num_groups": num_groups, "key_dim": key_dim, "value_dim": value_dim}
        reasons = [reason for name, size in sizes.items() for reason in count_reasons(name, size, minimum=1)]
        reasons += count_reasons("num_keys", num_keys, minimum=1) + count_reasons("window", window, minimum=0)
        if not reasons and capacity is None:
            capacity = num_keys if hard else 2 * num_keys
        if capacity is not None:
            reasons += count_reasons("capacity", capacity, minimum=1)
            if not reasons and capacity < num_keys:
                reasons.append(f"capacity must be at least num_keys = {num_keys}, got {capacity}")
        if dtype not in problem.DTYPES:
            reasons.append(f"dtype must be float64, float32, bfloat16 or float16, got {dtype}")
        if not isinstance(hard, bool):
            reasons.append(f"hard must be True or False, got {hard!r}")
        arguments = sizes | {"num_keys": num_keys, "window": window, "capacity": capacity, "hard": hard, "dtype": dtype}
        problem.refuse("SparseKCache", arguments, reasons)

        self.num_keys, self.window, self.capacity, self.hard = num_keys, window, capacity, hard
        slots = capacity + 1  # a key needs a place before it is known which of them goes
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        heads = (batch, num_groups)
        self._key = torch.zeros(*heads, slots + window, key_dim, dtype=dtype, device=device)
        self._value = torch.zeros(*heads, slots + window, value_dim, dtype=dtype, device=device)
        self._score = torch.full((*heads, slots + window), -torch.inf, dtype=wide, device=device)
        self._waiting = torch.zeros(*heads, window, dtype=wide, device=device)
        self._position = torch.zeros(*heads, slots, dtype=torch.int32, device=device)
        self._next = torch.zeros(heads, dtype=torch.int32, device=device)
        self._length = torch.zeros(heads, dtype=torch.int64, device=device)
        self._overflow = torch.zeros(heads, dtype=torch.int64, device=device)

    @property
    def lengths(self) -> Tensor:
        """Tokens so far ``[B]``, int64, padding left out."""
        return self._length[:, 0]

    @property
    def overflow(self) -> Tensor:
        """Keys ``[B, G]``, int64, dropped with a gate above 0 for want of capacity."""
        # What found no room lies where the next key goes, for the latest query to see.
        return self._overflow + (self._score.gather(-1, self._next[..., None].long())[..., 0] > -torch.inf)

    @property
    def nbytes(self) -> int:
        """Memory that the cache takes, in bytes."""
        return sum(x.numel() * x.element_size() for x in self.tensors())

    def reset(self) -> None:
        """Forgets everything."""
        self._score.fill_(-torch.inf)
        for x in (self._next, self._length, self._overflow):
            x.zero_()

    def reorder(self, index: Tensor) -> None:
        """Replaces batch entry ``i`` by what was entry ``index[i]``, for beam search; ``index [B]`` is an integer."""
        for x in self.tensors():
            x.copy_(x.index_select(0, index.to(x.device)))

    @torch.no_grad()
    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scores: Tensor,
        *,
        scale: float | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Appends tokens and attends with their queries over all tokens so far.

        Args:
            query: ``[B, T, H, K]``; ``H`` is a multiple of ``G``.
            key: ``[B, T, G, K]``.
            value: ``[B, T, G, Kv]``.
            scores: ``[B, T, G]``, as :func:`xformers_sparsek.sparsek_attention` takes them.
            scale: factor of ``q k^T``; ``K ** -0.5`` by default.
            mask: ``[B, T]``, False at padding, which is not appended and gets output 0; all tokens count by default.
                Waits for the device, and so do several tokens in one call.

        Returns:
            ``out [B, T, H, Kv]`` in the dtype of ``query``.

        Raises:
            ValueError: the inputs do not fit the cache or each other; the message names every reason.
        """
        self._refuse(query, key, value, scores, scale, mask)
        scale = scale_of(query, scale)
        if mask is None and query.shape[1] == 1:
            return self._attend_one(query, key, value, scores, scale)
        return self._attend_many(query, key, value, scores, scale, mask)

    def tensors(self) -> tuple[Tensor, ...]:
        """All that the cache is made of: tensors that stay where they are, and are written in place."""
        state = (self._key, self._value, self._score, self._waiting, self._position)
        return (*state, self._next, self._length, self._overflow)

    def _refuse(self, query, key, value, scores, scale, mask) -> None:
        reasons = problem.attention_reasons(query, key, value, scores, self.num_keys, self.window, scale, None, None)
        if not reasons:
            batch, groups, _, width = self._key.shape
            made_for = (batch, groups, width, self._value.shape[-1], self._key.dtype, self._key.device)
            got = (key.shape[0], key.shape[2], key.shape[3], value.shape[3], key.dtype, key.device)
            if got != made_for:
                reasons.append(f"the cache is made for B, G, K, Kv, dtype and device {made_for}, got {got}")
            if query.shape[1] != key.shape[1]:
                reasons.append(f"query has {query.shape[1]} tokens, key has {key.shape[1]}")
            if mask is not None and (tuple(mask.shape) != tuple(key.shape[:2]) or mask.dtype != torch.bool):
                reasons.append(f"mask must be bool {tuple(key.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}")
            reasons += problem.value_reasons(scores)
        arguments = {"query": query, "key": key, "value": value, "scores": scores, "scale": scale, "mask": mask}
        problem.refuse("SparseKCache.attend", arguments, reasons)

    def _attend_one(self, query: Tensor, key: Tensor, value: Tensor, scores: Tensor, scale: float) -> Tensor:
        threshold, expiry = torch.ops.xformers_sparsek.append(
            key, value, scores, *self.tensors(), self.num_keys, self.window, self.hard
        )
        places = (self._key, self._value, self._score)
        options = (None, None, 0, False, self.hard, scale, None)
        return torch.ops.xformers_sparsek.forward(
            query, *(x.transpose(1, 2) for x in places), threshold, expiry, *options
        )[0]

    def _attend_many(
        self, query: Tensor, key: Tensor, value: Tensor, scores: Tensor, scale: float, mask: Tensor | None
    ) -> Tensor:
        """Attends over what is kept and the new tokens, as packed sequences, and then keeps what can still be seen."""
        self._overflow.copy_(self.overflow)
        self._score.scatter_(-1, self._next[..., None].long(), -torch.inf)
        batch, tokens = key.shape[:2]
        real = [slice(tokens)] * batch if mask is None else [row.nonzero()[:, 0] for row in mask]
        queries = [query[b, real[b]] for b in range(batch)]
        lengths = self.lengths.tolist()
        sequences = [
            self._sequence(b, lengths[b], key[b, real[b]], value[b, real[b]], scores[b, real[b]]) for b in range(batch)
        ]
        sizes_q, sizes_k = [len(x) for x in queries], [len(x.key) for x in sequences]
        bounds = [torch.tensor([0, *sizes]).cumsum(0, dtype=torch.int32).to(key.device) for sizes in (sizes_q, sizes_k)]
        packed = torch.cat(queries)[None]
        keys, values, columns = (torch.cat([x[i] for x in sequences])[None] for i in range(3))
        pattern = (self.num_keys, self.window, True, self.hard, *bounds)
        columns, threshold, expiry = select(packed, columns, *pattern)
        options = (*bounds, self.window, True, self.hard, scale, None)
        attended, _ = torch.ops.xformers_sparsek.forward(packed, keys, values, columns, threshold, expiry, *options)
        out = query.new_zeros(*query.shape[:3], value.shape[-1])
        for b, (mine, last) in enumerate(zip(attended[0].split(sizes_q), expiry[0].split(sizes_k, -1))):
            out[b, real[b]] = mine
            if len(mine) > 0:
                self._keep(b, sequences[b], last, lengths[b] + len(mine))
        return out

    def _sequence(self, entry: int, length: int, key: Tensor, value: Tensor, scores: Tensor) -> _Sequence:
        """What is kept of a batch entry of ``length`` tokens, in their order, and new tokens behind it."""
        positions = torch.arange(length, length + len(key), dtype=torch.int32, device=key.device)
        new = _Sequence(key, value, scores.to(self._score.dtype), positions[:, None].expand(-1, key.shape[1]))
        ring = torch.arange(max(length - self.window, 0), length, device=key.device)
        latest = self._gather(entry, (self.capacity + 1 + ring % max(self.window, 1)).expand(key.shape[1], -1))
        latest = latest._replace(
            scores=self._waiting[entry].t()[ring % max(self.window, 1)],
            positions=ring.to(torch.int32)[:, None].expand(-1, key.shape[1]),
        )
        parts = [latest, new]
        if length >= max(self.window, 1):  # else there are no candidates, and a window must not reach the slots
            slots = slice(self.capacity + 1)
            order = torch.where(self._score[entry, :, slots] > -torch.inf, self._position[entry], -1).argsort(-1)
            parts.insert(0, self._gather(entry, order)._replace(positions=self._position[entry].gather(-1, order).t()))
        return _Sequence(*(torch.cat(x) for x in zip(*parts)))

    def _gather(self, entry: int, places: Tensor) -> _Sequence:
        """What lies in ``places [G, n]``, as sequences; positions are yet to be found."""
        heads = torch.arange(len(places), device=places.device)[:, None]
        parts = (x[entry][heads, places].transpose(0, 1) for x in (self._key, self._value, self._score))
        return _Sequence(*parts, places.t())

    def _keep(self, entry: int, sequence: _Sequence, expiry: Tensor, length: int) -> None:
        """Keeps of a sequence the keys that later queries may see; ``expiry [G, n]`` is that of its keys."""
        candidates = max(len(sequence.key) - self.window, 0)
        score = torch.where(expiry[:, :candidates] == _NEVER, sequence.scores[:candidates].t(), -torch.inf)
        kept, order = score.sort(dim=-1, descending=True, stable=True)
        kept, order = kept[:, : self.capacity], order[:, : self.capacity]
        dropped = (score > -torch.inf).sum(-1) - (kept > -torch.inf).sum(-1)
        heads, count = torch.arange(len(order), device=order.device)[:, None], order.shape[1]
        self._score[entry] = -torch.inf
        self._key[entry, :, :count] = sequence.key[order, heads]
        self._value[entry, :, :count] = sequence.value[order, heads]
        self._score[entry, :, :count] = kept
        self._position[entry, :, :count] = sequence.positions[order, heads]
        self._next[entry] = (kept > -torch.inf).sum(-1)
        self._overflow[entry] += dropped
        self._length[entry] = length
        latest = min(length, self.window)
        if latest > 0:
            ring = torch.arange(length - latest, length, device=order.device) % self.window
            place = self.capacity + 1 + ring
            self._key[entry, :, place] = sequence.key[-latest:].transpose(0, 1)
            self._value[entry, :, place] = sequence.value[-latest:].transpose(0, 1)
            self._score[entry, :, place] = torch.inf
            self._waiting[entry, :, ring] = sequence.scores[-latest:].t()
