"""SparseK attention for xFormers: learned, differentiable top-k selection of keys (arXiv:2406.16747).

Importing this package registers its operators with xFormers, where that is installed.
"""

from . import xformers_ops
from .attention import sparsek_attention
from .bias import SparseKBias
from .cache import SparseKCache
from .scorer import SparseKScorer
from .selection import sparsek

__version__ = "0.1.0"
__all__ = ["SparseKBias", "SparseKCache", "SparseKScorer", "sparsek", "sparsek_attention"]

xformers_ops.register(SparseKBias)
