from mslk.attention.fmha.attn_bias import AttentionBias, BlockDiagonalMask, LowerTriangularMask

__all__ = ["AttentionBias", "BlockDiagonalMask", "LowerTriangularMask"]
