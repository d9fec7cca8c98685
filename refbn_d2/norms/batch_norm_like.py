"""BatchNormLike2d, the base of norms that have BatchNorm's parameters and running statistics."""

from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .tracing import as_leaf

__all__ = ["BatchNormLike2d", "BufferNote", "holds", "note"]

# Buffers and their version counters, at which something about their content was known.
BufferNote = Tuple[Tuple[Tensor, int], ...]


def note(*buffers: Tensor) -> Optional[BufferNote]:
    """A note of the present content of ``buffers``, made on the host without reading them.

    Returns:
        The note, or None for tensors created in inference mode, which have no version counter.
    """
    if any(b.is_inference() for b in buffers):
        return None
    return tuple((b, b._version) for b in buffers)


def holds(noted: Optional[BufferNote], *buffers: Tensor) -> bool:
    """Whether ``buffers`` have not changed since :func:`note`, neither in place nor by replacement.

    An in-place write increments the version counter, and replacing a buffer changes the tensor
    object.
    """
    return noted is not None and all(
        old is b and not b.is_inference() and version == b._version
        for (old, version), b in zip(noted, buffers)
    )


class BatchNormLike2d(nn.BatchNorm2d):
    """A BatchNorm2d whose subclasses define how a batch is normalized by its statistics.

    This class derives from ``nn.BatchNorm2d`` so that code which looks for BatchNorm layers finds
    it: the weight decay of norms, precise-BN, ``freeze()`` and the conversion to FrozenBatchNorm2d
    in detectron2. Evaluation is BatchNorm's, one affine map per channel by the running statistics,
    unless a subclass overrides :meth:`_by_running_stats`.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: Same as in
            nn.BatchNorm2d of current PyTorch; older versions have no ``bias``.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: Optional[float] = 0.1,
        *,
        affine: bool = True,
        track_running_stats: bool = True,
        device=None,
        dtype=None,
        bias: bool = True,
    ):
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)

    def forward(self, input: Tensor) -> Tensor:
        """Normalizes (N, C, H, W) input; the output has its shape, dtype and memory format."""
        if not torch.jit.is_scripting():
            leaf = as_leaf(self, input)
            if leaf is not None:
                return leaf
        self._check_input_dim(input)
        if self._by_running_stats():
            return self._normalize_by_running_stats(input)
        return self._forward_by_batch(input)

    def _by_running_stats(self) -> bool:
        """Whether the layer is one affine map per channel by its running statistics."""
        return not self.training and self.running_mean is not None

    def _normalize_by_running_stats(self, x: Tensor) -> Tensor:
        # The same as BatchNorm's forward pass; TorchScript cannot call super().forward. For empty x
        # the gradients are zeros.
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )

    @torch.jit.unused
    def _forward_by_batch(self, x: Tensor) -> Tensor:
        raise NotImplementedError
