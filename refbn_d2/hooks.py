"""For a trainer of your own: the hook that captures the reference before its first step."""

from .engine.hooks.reference import ReferenceHook, global_batch

__all__ = ["ReferenceHook", "global_batch"]
