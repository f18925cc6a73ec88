"""Caches of transformers that keep the scores of keys, or what is left of the keys after selection."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from .. import problem
from ..cache import SparseKCache


class SparseKGenerationCache(DynamicCache):
    """Cache of constant size for ``generate``: its sparse layers forget keys that no later query will see.

    Pass a new one to each call: ``model.generate(**inputs, past_key_values=SparseKGenerationCache(model.config))``.
    Greedy search, sampling and beam search give what they give with a ``DynamicCache``, which keeps everything, as long
    as the capacity suffices. Memory is taken in the first forward pass, one :class:`xformers_sparsek.SparseKCache` for
    each sparse layer; dense layers keep all keys. Forgotten keys cannot be had back, so there is no assisted
    generation; and there are no gradients.

    Args:
        config: ``model.config`` of a model that ``sparsify`` was applied to.
        capacity: how many keys besides the window are kept for each row and key/value head, at least ``num_keys``; by
            default ``num_keys`` if ``hard`` and twice as many otherwise. See ``overflow``.
        compileable: whether ``generate`` may compile the passes of single tokens, as it does with transformers' own
            caches of fixed size; on a GPU they become one CUDA graph. Compiling takes seconds to minutes, once for a
            cache that starts over by ``reset`` between texts of the same batch size.

    Raises:
        ValueError: the configuration has no ``sparsek`` block, or ``compileable`` is asked of a model with dense
            layers, whose caches grow. A capacity that is too small is one in the first forward pass.
    """

    def __init__(self, config: PreTrainedConfig, *, capacity: int | None = None, compileable: bool = False) -> None:
        settings = getattr(config, "sparsek", None)
        reasons = ["the model has no scorers: call sparsify first"] if settings is None else []
        if not isinstance(compileable, bool):
            reasons.append(f"compileable must be True or False, got {compileable!r}")
        elif compileable and settings is not None:
            dense = sorted(set(range(config.num_hidden_layers)) - set(settings["layers"]))
            if dense:
                reasons.append(f"layers {dense} are dense and keep every key: their cache cannot be compiled")
        arguments = {"config": type(config).__name__, "capacity": capacity, "compileable": compileable}
        problem.refuse("SparseKGenerationCache", arguments, reasons)
        super().__init__(config=config)
        self.config = config
        pattern = {name: settings[name] for name in ("num_keys", "window", "hard")}
        for i in settings["layers"]:
            self.layers[i] = SparseKCacheLayer(capacity=capacity, compileable=compileable, **pattern)

    @property
    def overflow(self) -> dict[int, Tensor]:
        """How many keys ``[B, G]`` each sparse layer, by its index, dropped too early for want of capacity."""
        layers = {i: layer for i, layer in enumerate(self.layers) if isinstance(layer, SparseKCacheLayer)}
        return {i: layer.cache.overflow for i, layer in layers.items() if layer.is_initialized}

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask is made for."""
        # Sparse layers share their mask with dense ones, which see more keys.
        dense = [i for i, layer in enumerate(self.layers) if type(layer) is DynamicLayer]
        if dense and isinstance(self.layers[layer_idx], SparseKCacheLayer):
            layer_idx = dense[0]
        return super().get_mask_sizes(query_length, layer_idx)

    def reset(self) -> None:
        """Forgets everything; sparse layers keep their memory."""
        # Not every version of transformers empties dense layers on reset.
        empty = DynamicCache(config=self.config).layers
        for i, layer in enumerate(self.layers):
            if isinstance(layer, SparseKCacheLayer):
                layer.reset()
            else:
                self.layers[i] = empty[i]


class SparseKCacheLayer(CacheLayerMixin):
    """Layer of a :class:`SparseKGenerationCache`, around the :class:`xformers_sparsek.SparseKCache` named ``cache``.

    ``update`` gives the new keys and values back alone; ``cache.attend`` attends over all that came before them, too.
    """

    def __init__(
        self, *, num_keys: int, window: int, hard: bool, capacity: int | None, compileable: bool = False
    ) -> None:
        super().__init__()
        self.is_compileable = compileable  # transformers asks for this name
        self.options = {"num_keys": num_keys, "window": window, "hard": hard, "capacity": capacity}
        self.cache: SparseKCache | None = None
        # A graph cannot count in Python, and without one nobody need wait for the device.
        self.cumulative_length: Tensor | int = torch.tensor(0) if compileable else 0
        self._has_scores = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, groups, _, key_dim = key_states.shape
        self.dtype, self.device = autocast(key_states[:0]).dtype, key_states.device
        options = self.options | {"dtype": self.dtype, "device": self.device}
        self.cache = SparseKCache(batch, groups, key_dim, value_states.shape[3], **options)
        if self.is_compileable:
            self.cumulative_length = self.cumulative_length.to(self.device)
            # CUDA graphs write to the memory that they were captured with.
            for tensor in (self.cumulative_length, *self.cache.tensors()):
                torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def hand_over(self, scores: Tensor) -> None:
        """Notes that the tokens that the next ``update`` brings have scores."""
        self._has_scores = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        _require_scores(self._has_scores)
        self._has_scores = False
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cumulative_length += key_states.shape[2]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, self.cumulative_length

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.cumulative_length *= 0
        if self.cache is not None:
            self.cache.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.cache is not None:
            self.cache.reorder(beam_idx)

    def crop(self, *args, **kwargs) -> None:
        raise NotImplementedError(
            "SparseKGenerationCache forgets keys and cannot be cropped: use DynamicCache for assisted generation"
        )


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


def layer_of(cache: object, index: int) -> SparseKDynamicLayer | SparseKCacheLayer:
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
    if not isinstance(layer, (SparseKDynamicLayer, SparseKCacheLayer)):
        reason = "its keys have no scores: pass a new DynamicCache or SparseKGenerationCache"
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
