"""EvalRefBatchNorm2d: BatchNorm that evaluates an image as a member of a training batch."""

from typing import Optional, Tuple

import torch
from torch import Tensor, nn

from .batch_norm_like import BatchNormLike2d, BufferNote, holds, note
from .functional import sample_norm, statistics_dtype
from .tracing import in_backward

__all__ = ["EvalRefBatchNorm2d"]

# Training steps between two measurements of the weight: one costs a pass over the input.
_PERIOD = 16
_MOMENTUM = 0.1
# Below this weight an image's own statistics are left out, and evaluation costs what BatchNorm's
# does. Layers behind a normalized one have weights of a few percent, because the deviations of the
# images in a batch then cancel.
_LEAST_WEIGHT = 0.1


class EvalRefBatchNorm2d(BatchNormLike2d):
    """BatchNorm in training; in evaluation, RefBN with the running statistics as the reference.

    BatchNorm trains with the statistics of a batch of which each image is a part, and evaluates
    with running statistics that do not depend on the image. The two functions differ most if a
    batch has few images or if its images are alike, for example because they come from one camera.
    This norm trains exactly like BatchNorm, and evaluates every sample by its own statistics
    (mean_x, var_x over H and W) mixed with the running ones, as RefBN mixes a batch with its
    reference (Luo, Li and Zuo 2020, eq. 15-16)::

        mean = w mean_x + (1 - w) running_mean
        var  = w var_x  + (1 - w) running_var
        y    = weight (x - mean) / sqrt(var + eps) + bias

    **The weight w** of a layer is measured in training; it is not a hyperparameter. A sample's mean
    says this much about the mean of its batch: the least-squares regression of mean_B on mean_x
    (both as deviations from the running mean) has the slope

        w = E[(mean_B - running_mean)^2] / E[(mean_x - running_mean)^2],

    because mean_B is the average of the mean_x of its N samples, so that Cov(mean_B, mean_x),
    averaged over the samples, is Var(mean_B). Deviations are in units of the running standard
    deviation and averaged over channels. If the samples of a batch have an intraclass correlation
    rho, w = (1 + (N - 1) rho) / N: it is 1 / N for independent images, 1 for a batch of one image
    or of images that are all alike, and close to 0 behind a layer that has removed the mean of the
    batch already. A weight below 0.1 counts as 0.

    Every 16th training step takes part in moving averages of the two expectations, by
    ``num_batches_tracked``, so that a resumed run measures at the same steps. An untrained layer
    and one that was converted from BatchNorm have w = 0 and evaluate like BatchNorm;
    ``TEST.PRECISE_BN`` measures the weights of a trained network from training batches.

    Related: Schneider et al. 2020 mix in the same way with one fixed weight for all layers, to
    adapt to a shifted test set; EvalNorm (Singh and Shrivastava 2019) corrects the running
    statistics by learned weights; alpha-BN (You et al. 2021) has one weight by hand.

    A sample's output does not depend on the other samples of its batch in evaluation. Statistics
    are computed in float32 (float64 for float64 input).

    Args:
        num_features, eps, momentum, affine, device, dtype: Same as in nn.BatchNorm2d.

    Raises:
        ValueError: If ``track_running_stats`` is False, because evaluation needs them.

    Buffers:
        batch_deviation, image_deviation: Floating-point scalars, the two moving averages. Both
            start at 0.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: Optional[float] = 0.1,
        *,
        track_running_stats: bool = True,
        device=None,
        dtype=None,
        **kwargs,
    ):
        if not track_running_stats:
            raise ValueError(
                "EvalRefBN evaluates by running statistics: do not set track_running_stats=False"
            )
        factory = {"device": device, "dtype": dtype}
        super().__init__(num_features, eps, momentum, **factory, **kwargs)
        self.least_weight = _LEAST_WEIGHT  # an attribute, because TorchScript sees no globals
        self.register_buffer("batch_deviation", torch.zeros((), **factory))
        self.register_buffer("image_deviation", torch.zeros((), **factory))
        # num_batches_tracked on the host: to read the buffer in each step would wait for the GPU.
        self._step: Optional[int] = None
        # The weight on the host, and a note of the buffers that it was read from.
        self._known: Optional[Tuple[Optional[BufferNote], float]] = None

    @property
    def own_weight(self) -> Tensor:
        """The weight w of a sample's own statistics in evaluation, a scalar tensor in [0, 1]."""
        # In float32: the smallest numbers of float16 buffers would be 0.
        weight = self.batch_deviation.float() / self.image_deviation.float().clamp(min=1e-30)
        weight = torch.where(weight < self.least_weight, torch.zeros_like(weight), weight)
        return weight.clamp(max=1.0)

    @torch.no_grad()
    def set_own_weight(self, batch_deviation: Tensor, image_deviation: Tensor) -> None:
        """Sets both expectations of w, scalar tensors; see :meth:`deviations`."""
        self.batch_deviation.copy_(batch_deviation)
        self.image_deviation.copy_(image_deviation)

    @torch.no_grad()
    def deviations(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """Squared deviations of a training batch from the running mean: (of mean_B, of mean_x).

        Args:
            x: Tensor of shape (N, C, H, W), not empty.

        Returns:
            Two scalars in units of the running variance, averaged over channels, and the second
            over samples. The first is at most the second.
        """
        dtype = statistics_dtype(x)
        own = x.mean(dim=(2, 3), dtype=dtype)
        scale = torch.rsqrt(self.running_var.to(dtype) + self.eps)
        z = (own - self.running_mean.to(dtype)) * scale
        return z.mean(dim=0).square().mean(), z.square().mean()

    def _by_running_stats(self) -> bool:
        if self.training:
            return False
        if torch.jit.is_scripting() or torch.jit.is_tracing() or torch.compiler.is_compiling():
            return False  # the graph computes w
        return self._known_weight() == 0.0

    def _forward_by_batch(self, x: Tensor) -> Tensor:
        if x.numel() == 0:
            return self._normalize_by_running_stats(x)
        if self.training:
            return self._train(x)
        wide = x if x.dtype == torch.float64 else x.float()
        w = self.own_weight.to(wide.dtype)
        own_var, own_mean = torch.var_mean(wide, dim=(2, 3), correction=0)  # (N, C)
        mean = w * own_mean + (1 - w) * self.running_mean.to(wide.dtype)
        var = w * own_var + (1 - w) * self.running_var.to(wide.dtype)
        return sample_norm(x, mean, var, self.weight, self.bias, self.eps)

    @torch.jit.unused  # scripted models only evaluate
    def _train(self, x: Tensor) -> Tensor:
        if self._measures():
            # Before the running statistics move towards this batch.
            with torch.no_grad():
                batch, image = self.deviations(x)
                self.batch_deviation.lerp_(batch.to(self.batch_deviation.dtype), _MOMENTUM)
                self.image_deviation.lerp_(image.to(self.image_deviation.dtype), _MOMENTUM)
        return nn.BatchNorm2d.forward(self, x)

    def _measures(self) -> bool:
        """Whether this training step takes part in the moving averages."""
        if torch.compiler.is_compiling():
            return True  # a counter on the host would compile the layer again in each step
        if self._step is None:
            self._step = int(self.num_batches_tracked)
        self._step += 1
        # Activation checkpointing repeats a forward pass in the backward pass, and BatchNorm counts
        # it; it is measured once.
        return (self._step - 1) % _PERIOD == 0 and not in_backward()

    @torch.jit.unused
    def _known_weight(self) -> float:
        """:attr:`own_weight` on the host; it waits for the device only if a buffer has changed."""
        buffers = self.batch_deviation, self.image_deviation
        if any(b.is_meta for b in buffers):
            return 1.0
        if self._known is None or not holds(self._known[0], *buffers):
            self._known = note(*buffers), float(self.own_weight)
        return self._known[1]

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self._step = None
        # A BatchNorm checkpoint has no weight: the layer then evaluates like BatchNorm. A state
        # dict without an entry of this layer says nothing about it.
        of_this_layer = prefix + "running_mean" in state_dict
        for name in ("batch_deviation", "image_deviation"):
            buffer = getattr(self, name)
            value = torch.zeros_like(buffer) if of_this_layer else buffer
            state_dict.setdefault(prefix + name, value)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self):
        return {**self.__dict__, "_known": None}

    def extra_repr(self) -> str:
        if self.batch_deviation.is_meta:
            return super().extra_repr()
        return f"{super().extra_repr()}, own_weight={float(self.own_weight):.2f}"
