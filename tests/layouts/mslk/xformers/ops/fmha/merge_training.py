from mslk.attention.fmha.merge_training import memory_efficient_attention_partial_autograd, merge_attentions_autograd

__all__ = ["memory_efficient_attention_partial_autograd", "merge_attentions_autograd"]
