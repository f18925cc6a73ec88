"""Tiny random models of every supported family, and padded batches for them."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

VOCABULARY = 61
# Weights larger than models start with, so that attention decides about the logits.
COMMON = {"vocab_size": VOCABULARY, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = COMMON | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
DROPOUTS = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
GPT2 = COMMON | DROPOUTS | {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
FAMILIES = {
    "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel, GPT2),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, LLAMA),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, LLAMA | {"sliding_window": None}),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, LLAMA),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, LLAMA),
}
# From which token to before which each row is real.
PADDINGS = {
    "none": [(0, 24), (0, 24), (0, 24)],
    "left": [(7, 24), (0, 24), (23, 24)],
    "right": [(0, 24), (0, 5), (0, 1)],
    "both": [(3, 20), (0, 24), (10, 24)],
}


def build(family: str, *, implementation: str = "sdpa", seed: int = 0, **changes: object) -> PreTrainedModel:
    """A model in evaluation mode, with the same random weights for the same seed."""
    config_class, model_class, options = FAMILIES[family]
    torch.manual_seed(seed)
    config = config_class(**options | changes)
    config._attn_implementation = implementation
    return model_class(config).eval()


def attentions(model: PreTrainedModel) -> list[torch.nn.Module]:
    layers = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    return [layer.attn if hasattr(layer, "attn") else layer.self_attn for layer in layers]


def tokens(batch: int = 3, length: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def batch_of(padding: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Padded inputs, with positions that count real tokens."""
    mask = torch.zeros(3, 24, dtype=torch.long)
    for row, (first, last) in zip(mask, PADDINGS[padding]):
        row[first:last] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    batch = {"input_ids": tokens() * mask, "attention_mask": mask, "position_ids": positions}
    return {name: x.to(device) for name, x in batch.items()}


def real_logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Logits at real tokens ``[tokens, vocabulary]``."""
    return model(**batch).logits[batch["attention_mask"].bool()]
