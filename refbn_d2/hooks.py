"""For a trainer of your own: hooks that norms need.

RefBN, SyncRefBN and VBN need their reference captured before the first step, and MABN needs the
weights of convolutions centered after each.
"""

from .engine.hooks.reference import ReferenceHook, global_batch
from .engine.hooks.weight_centralization import WeightCentralization, center_weights

__all__ = ["ReferenceHook", "WeightCentralization", "center_weights", "global_batch"]
