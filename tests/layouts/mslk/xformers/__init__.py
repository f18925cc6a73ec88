"""Stands in for xFormers after 0.0.35, which is in no package registry yet.

Holds what matters to an add-on of its attention: ``xformers.ops.fmha`` has no code of its own any more and re-exports
``mslk.attention.fmha``, while ``xformers.ops.common`` and ``xformers.info`` are still xFormers' own.
"""

__version__ = "0.0.36+standin"
