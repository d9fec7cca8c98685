"""Files of weights: reading them without running code, and backbones of other libraries."""
