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
# Deviations of more standard deviations than this are of running statistics that do not fit yet, as
# in a first step. Their squares could be infinite, in float16 even those of ordinary images.
_MOST_DEVIATIONS = 100.0


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
    ``num_batches_tracked``, so that a resumed run measures at the same steps. (Under
    ``torch.compile`` it is every step, because a graph cannot choose.) An untrained layer
    and one that was converted from BatchNorm have w = 0 and evaluate like BatchNorm;
    ``TEST.PRECISE_BN`` measures the weights of a trained network from training batches.

    Related: Schneider et al. 2020 mix in the same way with one fixed weight for all layers, to
    adapt to a shifted test set; EvalNorm (Singh and Shrivastava 2019) corrects the running
    statistics by learned weights; alpha-BN (You et al. 2021) has one weight by hand.

    The buffers contain the whole state, whoever writes them. Only on a GPU a write through
    ``tensor.data`` is not seen; call :meth:`set_own_weight` after it.

    A sample's output does not depend on the other samples of its batch in evaluation. Statistics
    are computed in float32 (float64 for float64 input). Where something takes the running
    statistics away (``torch.func.replace_all_batch_norm_modules_``) this is BatchNorm.

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
        # Whether a measurement fell into a pass that activation checkpointing repeats.
        self._due = False
        # Whether the weight is 0, and a note of the buffers that this was read from.
        self._known: Optional[Tuple[Optional[BufferNote], bool]] = None

    @property
    def own_weight(self) -> Tensor:
        """The weight w of a sample's own statistics in evaluation, a scalar tensor in [0, 1]."""
        # In float32: the smallest numbers of float16 buffers would be 0.
        weight = self.batch_deviation.float() / self.image_deviation.float().clamp(min=1e-30)
        # NaN, which one channel of one batch can leave here for good, counts as 0, too.
        weight = torch.where(weight >= self.least_weight, weight, torch.zeros_like(weight))
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
        z = z.clamp(-_MOST_DEVIATIONS, _MOST_DEVIATIONS)
        return z.mean(dim=0).square().mean(), z.square().mean()

    def _by_running_stats(self) -> bool:
        if self.training or self.running_mean is None:
            return False
        if torch.jit.is_scripting() or torch.jit.is_tracing() or torch.compiler.is_compiling():
            return False  # the graph computes w
        return self._has_no_weight()

    def _forward_by_batch(self, x: Tensor) -> Tensor:
        if self.training or self.running_mean is None:
            return self._train(x)
        if x.numel() == 0:
            return self._normalize_by_running_stats(x)
        wide = x if x.dtype == torch.float64 else x.float()
        w = self.own_weight.to(wide.dtype)
        own_var, own_mean = torch.var_mean(wide, dim=(2, 3), correction=0)  # (N, C)
        mean = w * own_mean + (1 - w) * self.running_mean.to(wide.dtype)
        var = w * own_var + (1 - w) * self.running_var.to(wide.dtype)
        return sample_norm(x, mean, var, self.weight, self.bias, self.eps)

    @torch.jit.unused  # scripted models only evaluate
    def _train(self, x: Tensor) -> Tensor:
        if self.running_mean is not None:
            if x.numel() == 0:
                return self._normalize_by_running_stats(x)
            if self._measures():
                # Before the running statistics move towards this batch.
                with torch.no_grad():
                    batch, image = self.deviations(x)
                    self.batch_deviation.lerp_(batch.to(self.batch_deviation.dtype), _MOMENTUM)
                    self.image_deviation.lerp_(image.to(self.image_deviation.dtype), _MOMENTUM)
        return nn.BatchNorm2d.forward(self, x)

    def _measures(self) -> bool:
        """Whether this training step takes part in the moving averages."""
        if self.num_batches_tracked is None:
            return False
        if self.momentum == 1:
            # The running mean is that of the last batch, as while fvcore's PreciseBN runs.
            self._step = None
            return False
        if torch.compiler.is_compiling():
            return True  # a counter on the host would compile the layer again in each step
        if self._step is None or self.num_batches_tracked.is_cpu:
            try:
                self._step = int(self.num_batches_tracked)
            except RuntimeError:  # it has no value: vmap, fake tensors or a tracer
                return True
        self._step += 1
        if self._step == 1 and self.momentum is None:
            # The running mean is not an average yet, and a cumulative average begins anew in
            # torch.optim.swa_utils.update_bn, which the old weight should survive.
            return False
        # Activation checkpointing repeats a forward pass in the backward pass, and BatchNorm counts
        # it; it is measured once. A measurement that falls into a repeated pass is made in the next
        # one: if every second pass is repeated, all of them may fall into repeated ones.
        due = self._due or (self._step - 1) % _PERIOD == 0
        self._due = due and in_backward()
        return due and not self._due

    @torch.jit.unused
    def _has_no_weight(self) -> bool:
        """Whether :attr:`own_weight` is 0; waits for the device only if a buffer has changed.

        False if that is unknown, because the buffers have no values (meta device, vmap, fake
        tensors, a tracer).
        """
        buffers = self.batch_deviation, self.image_deviation
        try:
            if self.batch_deviation.is_cpu:
                # There is nothing to wait for, and writes through tensor.data are seen, too.
                batch, image = map(float, buffers)
                return not batch >= self.least_weight * max(image, 1e-30)
            if self._known is None or not holds(self._known[0], *buffers):
                self._known = note(*buffers), bool(self.own_weight == 0)
            return self._known[1]
        except RuntimeError:
            return False

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        self._step = None

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "image_deviation" in self._buffers:  # the base class calls this before they exist
            zero = torch.zeros_like(self.image_deviation)
            self.set_own_weight(zero, zero)

    def _replicate_for_data_parallel(self):
        replica = super()._replicate_for_data_parallel()
        replica._step = None  # a replica's count would end with it
        return replica

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self._step, self._due, self._known = None, False, None
        # A BatchNorm checkpoint has no weight: the layer then evaluates like BatchNorm. A state
        # dict without an entry of this layer says nothing about it.
        of_this_layer = state_dict.get(prefix + "running_mean")
        for name in ("batch_deviation", "image_deviation"):
            value = getattr(self, name)
            if of_this_layer is not None:  # on its device, because this layer may be on meta
                value = torch.zeros_like(value, device=of_this_layer.device)
            state_dict.setdefault(prefix + name, value)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self):
        return {**self.__dict__, "_known": None}

    def extra_repr(self) -> str:
        try:
            weight = f"{float(self.own_weight):.2f}"
        except RuntimeError:  # meta device, fake tensors
            weight = "unknown"
        return f"{super().extra_repr()}, own_weight={weight}"
