"""SparseK attention in Hugging Face transformers, as ``attn_implementation="sparsek"``.

:func:`sparsify` gives a causal language model its scorers, one :class:`xformers_sparsek.SparseKScorer` in each chosen
attention module, and writes what they need to know into ``model.config.sparsek``. A forward pre-hook of the attention
module scores the hidden states that keys are made from; the attention function finds the scores among its arguments.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, prepare_padding_mask, sdpa_mask
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .. import problem
from ..attention import sparsek_attention
from ..scorer import SparseKScorer
from ..selection import count_reasons
from .transformers_cache import SparseKCacheLayer, SparseKDynamicLayer, SparseKGenerationCache, autocast, layer_of

__all__ = ["SparseKGenerationCache", "from_pretrained", "parameter_groups", "sparsify", "train_scorers_only"]

NAME = "sparsek"
# For each model type, where a causal language model has its layers, and a layer its attention.
FAMILIES = {
    "gpt2": ("transformer.h", "attn"),
    "llama": ("model.layers", "self_attn"),
    "mistral": ("model.layers", "self_attn"),
    "qwen2": ("model.layers", "self_attn"),
    "qwen3": ("model.layers", "self_attn"),
}
# What models ask of an attention function that this one cannot do, by the name of the argument.
UNSUPPORTED = {
    "sliding_window": "a sliding window",
    "softcap": "soft-capped logits",
    "s_aux": "attention sinks",
    "position_bias": "a position bias",
    "head_mask": "a head mask",
    "output_attentions": "attention weights as an output",
    "cu_seq_lens_q": "packed sequences",
}
# What tells one repository, or one version of it, from another, when a configuration is looked up.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def sparsify(
    model: PreTrainedModel,
    *,
    num_keys: int,
    window: int = 0,
    hard: bool = False,
    layers: Iterable[int] | None = None,
    spread: float = 1.0,
    slope: float = 1.0,
    slope_ratio: float = 64.0,
    slope_length: int | None = None,
) -> PreTrainedModel:
    """Gives a causal language model SparseK attention, with new scorers, in place.

    Each chosen attention module gets a ``sparsek_scorer``, which scores every token for each of its key/value heads, in
    the device and dtype of the model. The arguments are kept as ``model.config.sparsek``, a dict; ``num_keys``,
    ``window`` and ``hard`` may be changed there later. ``save_pretrained`` saves the scorers with the other weights;
    :func:`from_pretrained` loads them. With ``model.set_attn_implementation("sdpa")`` the model is dense again.

    Args:
        model: a causal language model of the families GPT-2, Llama, Mistral, Qwen2 or Qwen3.
        num_keys: how many keys a query sees by their scores, about (see :func:`xformers_sparsek.sparsek_attention`).
        window: how many of the latest keys it sees besides, whatever their scores.
        hard: whether the gates of selected keys are 1, rather than continuous in the scores.
        layers: indices of the layers that get SparseK attention, all by default. The others stay dense, through
            PyTorch's ``scaled_dot_product_attention``.
        spread, slope, slope_ratio, slope_length: how the scorers start, as for :class:`xformers_sparsek.SparseKScorer`;
            ``slope_length`` is ``num_keys`` by default.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: the model or an argument is not supported; the message names every reason.
    """
    reasons = _model_reasons(model)
    chosen = None
    if not reasons:
        chosen = list(range(model.config.num_hidden_layers) if layers is None else layers)
        reasons += _layer_reasons(model.config, chosen)
    reasons += count_reasons("num_keys", num_keys, minimum=1) + count_reasons("window", window, minimum=0)
    reasons += problem.flag_reasons(window, True, hard)
    arguments = {"model": type(model).__name__, "num_keys": num_keys, "window": window, "hard": hard, "layers": layers}
    problem.refuse("sparsify", arguments, reasons)

    settings = {"num_keys": num_keys, "window": window, "hard": hard, "layers": sorted(chosen)}
    slope_length = num_keys if slope_length is None else slope_length
    settings |= {"spread": spread, "slope": slope, "slope_ratio": slope_ratio, "slope_length": slope_length}
    _attach_scorers(model, settings)
    model.config.sparsek = settings
    model.set_attn_implementation(NAME)
    return model


def from_pretrained(name_or_path: str | os.PathLike, **options: object) -> PreTrainedModel:
    """Loads a model that was saved after :func:`sparsify`, scorers included.

    (``AutoModelForCausalLM.from_pretrained`` loads the same checkpoint as a dense model: it leaves the scorers out, and
    warns that their weights were not used.)

    Args:
        name_or_path: a folder that ``save_pretrained`` wrote, or the name of a repository on the Hugging Face hub.
        options: what ``AutoModelForCausalLM.from_pretrained`` takes, such as ``dtype``, ``device_map`` or ``revision``.

    Returns:
        The causal language model, of its own class, with ``attn_implementation="sparsek"``.

    Raises:
        ValueError: the checkpoint is of no family that :func:`sparsify` takes, was not saved after it, or lacks weights
            of scorers.
    """
    hub = {name: options[name] for name in HUB_OPTIONS if name in options}
    config = AutoConfig.from_pretrained(name_or_path, **hub)
    reasons = _family_reasons(config)
    if getattr(config, "sparsek", None) is None:
        reasons.append("its configuration has no sparsek block: load it with transformers and call sparsify")
    problem.refuse("from_pretrained", {"checkpoint": str(name_or_path)}, reasons)

    plain = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]

    def init(self, config, *args, **kwargs):
        plain.__init__(self, config, *args, **kwargs)
        _attach_scorers(self, config.sparsek)

    # The scorers must be there before the weights are loaded, which drops the weights that it knows no place for.
    with_scorers = type(plain.__name__, (plain,), {"__init__": init, "__module__": plain.__module__})
    model, loaded = with_scorers.from_pretrained(
        name_or_path, attn_implementation=NAME, output_loading_info=True, **options
    )
    missing = sorted(name for name in loaded["missing_keys"] if ".sparsek_scorer." in name)
    reasons = [f"it has no weights {', '.join(missing)}"] if missing else []
    problem.refuse("from_pretrained", {"checkpoint": str(name_or_path)}, reasons)
    # From here on it is what sparsify makes; nothing else needs the class that was made up for loading.
    model.__class__ = plain
    return model


def train_scorers_only(model: PreTrainedModel) -> PreTrainedModel:
    """Freezes everything but the scorers of a model that :func:`sparsify` was applied to, in place.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: the model has no scorers.
    """
    scorers = _scorers_of(model, "train_scorers_only")
    model.requires_grad_(False)
    for scorer in scorers:
        scorer.requires_grad_(True)
    return model


def parameter_groups(
    model: PreTrainedModel, *, lr: float, scorer_lr: float, weight_decay: float = 0.0
) -> list[dict[str, object]]:
    """What to give an optimizer, so that new scorers learn faster than what they are added to.

    New scorers have far to go in few steps. In ``examples/compare_lm.py`` converted models lose least with a
    ``scorer_lr`` of 30 to 200 times ``lr``, and with many steps of few texts.

    Args:
        model: a model that :func:`sparsify` was applied to.
        lr: the learning rate of all other parameters.
        scorer_lr: the learning rate of the scorers.
        weight_decay: of all other parameters. Scorers get none, since decay makes scores equal, which selects nothing.

    Returns:
        Two groups of those parameters that require gradients, the scorers' first; for the optimizers of PyTorch, and
        through these for the argument ``optimizers`` of ``Trainer``.

    Raises:
        ValueError: the model has no scorers.
    """
    scorers = {id(parameter) for scorer in _scorers_of(model, "parameter_groups") for parameter in scorer.parameters()}
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    new, old = ([x for x in learning if (id(x) in scorers) == wanted] for wanted in (True, False))
    return [
        {"params": new, "lr": scorer_lr, "weight_decay": 0.0},
        {"params": old, "lr": lr, "weight_decay": weight_decay},
    ]


def _scorers_of(model: PreTrainedModel, asked: str) -> list[SparseKScorer]:
    scorers = [module for module in model.modules() if isinstance(module, SparseKScorer)]
    reasons = [] if scorers else ["it has no scorers: call sparsify first"]
    problem.refuse(asked, {"model": type(model).__name__}, reasons)
    return scorers


def sparsek_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sparsek_scores: Tensor | None = None,
    sparsek_layer: SparseKDynamicLayer | SparseKCacheLayer | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The attention function of ``attn_implementation="sparsek"``; models call it.

    Args:
        module: the attention module; ``module.config.sparsek`` says how it selects. Layers that it does not name are
            attended densely.
        query: ``[B, H, T, K]``.
        key: ``[B, G, S, K]``, of the queries' own tokens at the end and of those in the cache before them; of the
            queries' tokens alone with a :class:`SparseKGenerationCache`.
        value: ``[B, G, S, Kv]``.
        attention_mask: True for keys that may be seen: ``[B, 1, 1, S]``, or ``[B, 1, T, S]`` with causality in it; None
            without padding. Rows are attended as sequences of their real tokens alone.
        dropout: of the attention weights; must be 0.
        scaling: factor of ``q k^T``.
        sparsek_scores: ``[B, T, G]``, from the forward pre-hook.
        sparsek_layer: the layer of the cache, if there is one, which has the scores of the keys before.
        kwargs: what else the model passes; what would change the attention is refused.

    Returns:
        ``out [B, T, H, Kv]``, 0 at padding, and None for the weights.

    Raises:
        ValueError: the call is not supported; the message names every reason.
    """
    settings = getattr(module.config, "sparsek", None)
    if settings is not None and module.layer_idx not in settings["layers"]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    forgetful = isinstance(sparsek_layer, SparseKCacheLayer)
    if forgetful and attention_mask is not None:
        # Made for dense layers, it may cover keys that came before these.
        attention_mask = attention_mask[..., -key.shape[2] :]
    reasons = _call_reasons(module, settings, dropout, sparsek_scores, kwargs)
    reasons += _mask_reasons(attention_mask, query, key)
    if forgetful and torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value, sparsek_scores)):
        reasons.append("SparseKGenerationCache has no gradients: call the model under torch.no_grad()")
    arguments = {"module": type(module).__name__, "query": query, "key": key, "value": value}
    problem.refuse(f'attn_implementation="{NAME}"', arguments | {"mask": attention_mask}, reasons)

    query, key, value = (autocast(x).transpose(1, 2) for x in (query, key, value))
    # The last query sees all that its row has, so its mask tells the real tokens.
    real = None if attention_mask is None else attention_mask[:, 0, -1].expand(len(query), -1)
    if forgetful:
        # Without a mask a token takes the short way.
        real = None if real is None or real.all() else real
        return sparsek_layer.cache.attend(query, key, value, sparsek_scores, scale=scaling, mask=real), None
    options = {"window": settings["window"], "hard": settings["hard"], "scale": scaling}
    scores = sparsek_scores if sparsek_layer is None else sparsek_layer.scores
    if real is None:
        return sparsek_attention(query, key, value, scores, settings["num_keys"], **options), None
    asking = real[:, real.shape[1] - query.shape[1] :]
    # Packed, since a key in the window of a query is seen whatever its score: padding must not be there at all.
    packed = (query[asking], key[real], value[real], scores[real])
    lengths = (_cumulative(asking), _cumulative(real))
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    out[asking] = sparsek_attention(
        *(x.unsqueeze(0) for x in packed), settings["num_keys"], cu_seqlens=lengths, **options
    )[0]
    return out, None


def sparsek_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: object = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    config: PreTrainedConfig | None = None,
    **kwargs: object,
) -> Tensor | None:
    """The mask function of ``attn_implementation="sparsek"``; models call it once for all layers.

    Args:
        attention_mask: ``[B, S]``, True for real tokens.
        mask_function: the pattern besides padding; only the causal one is supported.
        local_size: not None for a sliding window, which only dense layers of a model have.
        config: of the model. The other arguments are those of ``transformers.masking_utils.sdpa_mask``.

    Returns:
        None without padding, else True for real keys: ``[B, 1, 1, S]`` where all layers are sparse, which takes no
        memory quadratic in the length, ``[B, 1, T, S]`` with causality in it where there are dense ones.

    Raises:
        ValueError: the pattern is not the causal one, as with sequences packed by their ``position_ids``.
    """
    settings = getattr(config, "sparsek", None)
    if local_size is None and mask_function is not causal_mask_function:
        reason = (
            "the mask is not causal alone: packed sequences and masks of one's own are not supported (under "
            "torch.compile, transformers takes every batch without attention_mask and cache for packed)"
        )
        problem.refuse(f'attn_implementation="{NAME}"', {"queries": q_length, "keys": kv_length}, [reason])
    if settings is None or len(settings["layers"]) < config.num_hidden_layers:
        return sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size, **kwargs
        )
    if attention_mask is None:
        return None
    kv_offset = int(kv_offset)  # a tensor where the cache is compileable
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    padding = padding[:, kv_offset : kv_offset + kv_length]
    return None if padding.all() else padding[:, None, None, :]


def _attach_scorers(model: PreTrainedModel, settings: Mapping[str, object]) -> None:
    """Gives the layers that ``settings`` name new scorers, and the hooks that call them."""
    config = model.config
    path, name = FAMILIES[config.model_type]
    groups = getattr(config, "num_key_value_heads", config.num_attention_heads)
    options = {name: settings[name] for name in ("spread", "slope", "slope_ratio", "slope_length")}
    chosen = [getattr(model.get_submodule(path)[i], name) for i in settings["layers"]]
    devices = [next(attention.parameters()).device for attention in chosen]
    scorers = [SparseKScorer(config.hidden_size, groups, device=x, dtype=model.dtype, **options) for x in devices]
    for attention, scorer in zip(chosen, scorers):
        attention.sparsek_scorer = scorer
        attention.register_forward_pre_hook(_pass_scores, with_kwargs=True)


def _pass_scores(attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Scores the hidden states that an attention module is called with, for its attention function and its cache."""
    if attention.config._attn_implementation != NAME:
        return None
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    scores = attention.sparsek_scorer(hidden, kwargs["position_ids"])
    cache = kwargs.get("past_key_values")
    layer = None if cache is None else layer_of(cache, attention.layer_idx)
    if layer is not None:
        layer.hand_over(scores)
    return args, kwargs | {"sparsek_scores": scores, "sparsek_layer": layer}


def _cumulative(real: Tensor) -> Tensor:
    """``cu_seqlens`` of the rows of ``real [B, S]``."""
    return nn.functional.pad(real.sum(1).cumsum(0), (1, 0)).int()


def _family_reasons(config: PreTrainedConfig) -> list[str]:
    if getattr(config, "model_type", None) in FAMILIES:
        return []
    return [f"the model type {getattr(config, 'model_type', None)!r} is none of {', '.join(FAMILIES)}"]


def _model_reasons(model: object) -> list[str]:
    """Reasons against a model, whichever layers are chosen."""
    if not isinstance(model, PreTrainedModel):
        return [f"the model must be a transformers model, got {type(model).__name__}"]
    config = model.config
    reasons = _family_reasons(config)
    if not reasons and not isinstance(model, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]):
        reasons.append(f"the model must be a {MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__}")
    if any(isinstance(module, SparseKScorer) for module in model.modules()):
        reasons.append("it has scorers already")
    if getattr(config, "is_causal", True) is False:
        reasons.append("its attention is not causal")
    if getattr(config, "add_cross_attention", False):
        reasons.append("it has cross-attention")
    return reasons


def _layer_reasons(config: PreTrainedConfig, layers: list) -> list[str]:
    """Reasons against the chosen layers of a supported model."""
    count = config.num_hidden_layers
    if not layers or any(type(i) is not int or not 0 <= i < count for i in layers) or len(set(layers)) < len(layers):
        return [f"layers must be different indices from 0 to {count - 1}, at least one, got {layers}"]
    window = getattr(config, "sliding_window", None)
    kinds = (
        getattr(config, "layer_types", None) or ["full_attention" if window is None else "sliding_attention"] * count
    )
    sliding = [i for i in layers if kinds[i] != "full_attention"]
    if not sliding:
        return []
    return [
        f"layers {sliding} have a sliding window of {window} tokens, beyond which they see no key: leave them out of "
        "layers, or load the model without it (sliding_window=None for Mistral, use_sliding_window=False for Qwen)"
    ]


def _call_reasons(
    module: nn.Module, settings: Mapping | None, dropout: float, scores: Tensor | None, kwargs: Mapping[str, object]
) -> list[str]:
    """Reasons against one call of the attention function."""
    reasons = []
    if settings is None:
        reasons.append("the model has no scorers: call sparsify from xformers_sparsek.integrations.transformers")
    elif scores is None:
        reasons.append(
            "the scorers are not there: load the model with from_pretrained from "
            "xformers_sparsek.integrations.transformers"
        )
    if dropout > 0:
        reasons.append(
            f"attention dropout of {dropout} in training: load the model with attention_dropout=0.0 (GPT-2: attn_pdrop)"
        )
    flags = (getattr(module, "is_causal", None), kwargs.get("is_causal"), getattr(module.config, "is_causal", None))
    if any(flag is False for flag in flags):
        reasons.append("the attention is not causal")
    asked = [name for name in UNSUPPORTED if kwargs.get(name) is not None and kwargs[name] is not False]
    return reasons + [f"{UNSUPPORTED[name]} cannot be had with it" for name in asked]


def _mask_reasons(mask: Tensor | None, query: Tensor, key: Tensor) -> list[str]:
    """Reasons against an attention mask: anything but causality and padding."""
    if mask is None:
        return []
    batch, queries, keys = len(query), query.shape[2], key.shape[2]
    shapes = [(rows, 1, height, keys) for rows in (1, batch) for height in (1, queries)]
    if mask.dtype != torch.bool or tuple(mask.shape) not in shapes:
        return [f"the mask must be boolean of shape {(batch, 1, 1, keys)} or {(batch, 1, queries, keys)}"]
    if mask.shape[2] > 1:
        causal = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril(keys - queries)
        if not torch.equal(mask, causal & mask[:, :, -1:]):
            return ["the mask is not causality and padding alone"]
    return []


AttentionInterface.register(NAME, sparsek_attention_forward)
AttentionMaskInterface.register(NAME, sparsek_mask)
