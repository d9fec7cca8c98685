"""ReferenceNorm2d, the base of every norm that holds a reference."""

import logging
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import BatchStatistics, batch_statistics
from .moments import Moments

__all__ = ["ReferenceNorm2d"]

logger = logging.getLogger(__name__)

_REFERENCE_KEYS = ("ref_mean", "ref_var", "ref_captured")


class ReferenceNorm2d(nn.BatchNorm2d):
    """A BatchNorm2d that also holds the statistics of one fixed reference batch.

    It *is* an ``nn.BatchNorm2d`` so that what looks for BatchNorm finds it: the weight decay of
    norms, precise-BN, ``freeze()`` and the conversion to FrozenBatchNorm2d in detectron2. It has
    BatchNorm's parameters and buffers under BatchNorm's names, and loads a BatchNorm state dict
    without complaint (the reference is then not captured). Evaluation is BatchNorm's: one affine
    map per channel by the running statistics.

    Subclasses say in :meth:`_normalize` how a training batch is normalized by the reference.

    Buffers:
        ref_mean: (num_features,), mean of the reference batch (eq. 11).
        ref_var: (num_features,), its biased variance (eq. 12).
        ref_captured: bool scalar, whether the above have been taken.
        ref_size: int scalar, number of samples they come from; 0 where nobody said. Part of the
            state dict only of a norm that needs it.
    """

    _fallback_logged = False
    _needs_size = False

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
    ):
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        factory = {"device": device, "dtype": dtype}
        self.register_buffer("ref_mean", torch.zeros(num_features, **factory))
        self.register_buffer("ref_var", torch.ones(num_features, **factory))
        self.register_buffer("ref_captured", torch.tensor(False, device=device))
        self.register_buffer("ref_size", torch.tensor(0, device=device), self._needs_size)
        # A copy of ref_captured on the host: reading the buffer would wait for the GPU each step.
        self._has_reference = False
        # Set while norms.capture() runs.
        self._moments: Optional[Moments] = None

    @property
    def has_reference(self) -> bool:
        """Whether a reference is held."""
        return self._has_reference

    @torch.no_grad()
    def set_reference(
        self, mean: Tensor, var: Tensor, count: Optional[int] = None, size: int = 0
    ) -> None:
        """Fixes the reference.

        Args:
            mean: (num_features,), eq. 11.
            var: (num_features,), biased, eq. 12.
            count: elements per channel that they come from, if known.
            size: samples (images, RoIs) that they come from; 0 if unknown.

        Raises:
            ValueError: see :meth:`check_reference`.
        """
        self.check_reference(count, size)
        self.ref_mean.copy_(mean)
        self.ref_var.copy_(var)
        self.ref_size.fill_(size)
        self.ref_captured.fill_(True)
        self._has_reference = True

    def check_reference(self, count: Optional[int], size: int) -> None:
        """Raises a ValueError if so few values cannot be a reference."""
        if count == 1:
            raise ValueError(
                f"{self!r}: a reference needs more than 1 value per channel, got 1; "
                "use a larger reference batch"
            )

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "ref_captured" in self._buffers:  # the base class calls this before they exist
            self.drop_reference()

    def drop_reference(self) -> None:
        """Forgets the reference, as if none had been captured."""
        self.ref_mean.zero_()
        self.ref_var.fill_(1)
        self.ref_size.zero_()
        self.ref_captured.fill_(False)
        self._has_reference = False

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes x, (N, C, H, W); same shape, dtype and memory format out."""
        self._check_input_dim(x)
        if self._moments is None and self._by_running_stats():
            # BatchNorm's own forward pass, which TorchScript cannot call from here.
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return self._forward_by_reference(x)

    @torch.jit.unused
    def _forward_by_reference(self, x: Tensor) -> Tensor:
        self._check_channels(x)
        if self._moments is not None:
            return self._capture(x)
        if x.numel() == 0:
            return self._affine(x)
        if not self._has_reference:
            self._take_reference(batch_statistics(x))
        return self._normalize(x)

    def _check_channels(self, x: Tensor) -> None:
        if x.shape[1] != self.num_features:
            raise ValueError(
                f"expected {self.num_features} channels, got an input of shape {tuple(x.shape)}"
            )

    def _by_running_stats(self) -> bool:
        return not self.training and self.running_mean is not None

    def _normalize(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _affine(self, x: Tensor, mean: Optional[Tensor] = None, var: Optional[Tensor] = None):
        """gamma (x - mean) / sqrt(var + eps) + beta; also of empty x, where gradients are zeros."""
        mean = self.ref_mean if mean is None else mean.to(self.ref_mean.dtype)
        var = self.ref_var if var is None else var.to(self.ref_var.dtype)
        return F.batch_norm(x, mean, var, self.weight, self.bias, training=False, eps=self.eps)

    def _capture(self, x: Tensor) -> Tensor:
        self._moments.add(x)
        return self._affine(x, self._moments.mean, self._moments.var)

    def _take_reference(self, batch: BatchStatistics) -> None:
        """The first batch becomes the reference where nobody captured one."""
        if not self.training:
            raise ValueError(
                f"{self!r}: no reference is captured, and evaluation needs one where no running "
                "statistics are tracked"
            )
        if batch.count == 1:
            raise ValueError(
                f"{self!r}: no reference is captured and this batch has only 1 value per channel "
                "to take one from; capture a reference batch before training"
            )
        if not ReferenceNorm2d._fallback_logged:
            ReferenceNorm2d._fallback_logged = True
            logger.warning(
                "No reference was captured before training: each layer takes the first batch it "
                "sees as its reference. refbn_d2.capture_reference(model, batch) chooses it."
            )
        self.set_reference(batch.mean, batch.var, batch.count, batch.samples)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.ref_size.zero_()  # of another reference, unless it is in the state dict
        keys = [prefix + k for k in (*_REFERENCE_KEYS, *["ref_size"] * self._needs_size)]
        if not any(k in state_dict for k in keys):
            # A BatchNorm checkpoint. A reference held so far is that of other weights.
            self.drop_reference()
            state_dict = {**state_dict, **{k: getattr(self, k[len(prefix) :]) for k in keys}}
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._has_reference = bool(self.ref_captured)

    def extra_repr(self) -> str:
        held = "captured" if self._has_reference else "not captured"
        return f"{super().extra_repr()}, reference={held}"
