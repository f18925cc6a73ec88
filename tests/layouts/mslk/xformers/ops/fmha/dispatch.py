"""A stub: importing it replaces the real module under the name ``xformers.ops.fmha.dispatch``."""

from mslk.attention.fmha.dispatch import _dispatch_fw_priority_list

__all__ = ["_dispatch_fw_priority_list"]
