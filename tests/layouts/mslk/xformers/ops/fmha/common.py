from mslk.attention.fmha.common import AttentionBwOpBase, AttentionFwOpBase, Context, Gradients, Inputs

__all__ = ["AttentionBwOpBase", "AttentionFwOpBase", "Context", "Gradients", "Inputs"]
