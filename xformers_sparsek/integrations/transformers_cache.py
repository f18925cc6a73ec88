"""Caches of transformers that keep the scores of keys."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from .. import problem


class SparseKDynamicLayer(DynamicLayer):
    """Layer of a ``DynamicCache`` that keeps the scores of its keys, too: ``scores [B, S, G]``.

    It takes the place of the plain layer when a sparsified layer sees an empty cache.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scores: Tensor | None = None
        self._new_scores: Tensor | None = None

    def hand_over(self, scores: Tensor) -> None:
        """Takes the scores ``[B, T, G]`` of the tokens that the next ``update`` brings keys and values of."""
        self._new_scores = scores

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        new, self._new_scores = self._new_scores, None
        _require_scores(new is not None)
        self.scores = new if self.scores is None else torch.cat([self.scores, new], 1)
        return super().update(key_states, value_states, *args, **kwargs)

    def crop(self, *args, **kwargs) -> None:
        super().crop(*args, **kwargs)
        if self.scores is not None:
            self.scores = self.scores[:, : self.get_seq_length()]

    def reset(self) -> None:
        super().reset()
        # Not every version of transformers forgets the keys here.
        if not self.is_initialized:
            self.scores = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self.scores is not None:
            self.scores = self.scores.index_select(0, beam_idx.to(self.scores.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.scores is not None:
            self.scores = self.scores.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self.scores is not None:
            self.scores = self.scores[indices]


def layer_of(cache: object, index: int) -> SparseKDynamicLayer:
    """The layer ``index`` of a cache, one that keeps scores; put there if the cache is new.

    Raises:
        ValueError: the cache, or what it holds already, has no place for scores.
    """
    layer = None
    if isinstance(cache, Cache):
        while cache.layer_class_to_replicate is not None and len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
        layer = cache.layers[index]
        if type(layer) is DynamicLayer and not layer.is_initialized:
            layer = cache.layers[index] = SparseKDynamicLayer()
    if not isinstance(layer, SparseKDynamicLayer):
        reason = "its keys have no scores: pass a new DynamicCache"
        arguments = {"cache": type(cache).__name__, "layer": f"{type(layer).__name__} at {index}"}
        problem.refuse('attn_implementation="sparsek"', arguments, [reason])
    return layer


def autocast(tensor: Tensor) -> Tensor:
    """What autocast would make of an argument of PyTorch's own attention."""
    kind = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor


def _require_scores(given: bool) -> None:
    if not given:
        raise RuntimeError(
            "a cache of SparseK attention got keys without scores: it serves models that sparsify was applied to, "
            'under attn_implementation="sparsek"'
        )
