"""MovingAverageBatchNorm2d: BatchNorm by moving averages, in its gradient, too."""

from typing import Optional, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .batch_norm_like import BatchNormLike2d
from .functional import check_channels, statistics_dtype
from .repeated import RecentPasses
from .running import count_batch
from .tracing import in_backward

__all__ = ["MovingAverageBatchNorm2d"]

_R_MAX = 5.0
# The state that BatchNorm does not have.
_WINDOWS = ("square_window", "gradient_window", "num_gradients_tracked")


def _per_channel(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


class _Normalize(torch.autograd.Function):
    """y = weight r x / chi + bias, with a gradient that is not the derivative of this function.

    With x_hat = x / chi and g = dL/dy weight r::

        psi_B = mean over N, H, W of g x_hat
        dx    = (g - x_hat psi) / chi,  psi = layer._average_gradient(psi_B)

    and weight and bias have the usual gradients. Only x and vectors of shape (C,) are saved.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, chi, r, layer):
        ctx.save_for_backward(x, weight, chi, r)
        ctx.layer = layer
        ctx.bias_dtype = None if bias is None else bias.dtype
        scale = r / chi if weight is None else weight.to(r.dtype) * r / chi
        y = x.to(chi.dtype) * _per_channel(scale)
        if bias is not None:
            y = y + _per_channel(bias.to(y.dtype))
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        # Read only once, because activation checkpointing forbids unpacking a tensor twice.
        x, weight, chi, r = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_y = grad_y.to(chi.dtype)
        x_hat = x.to(chi.dtype) / _per_channel(chi)
        mean = (grad_y * x_hat).mean(dim=(0, 2, 3))
        grad_x = grad_weight = grad_bias = None
        if needs_x:
            scale = r if weight is None else weight.to(r.dtype) * r
            psi = ctx.layer._average_gradient(scale * mean)
            grad_x = (grad_y * _per_channel(scale) - x_hat * _per_channel(psi)) / _per_channel(chi)
            grad_x = grad_x.to(x.dtype)
        if needs_weight:
            grad_weight = (r * mean * (x.numel() // x.shape[1])).to(weight.dtype)
        if needs_bias:
            grad_bias = grad_y.sum(dim=(0, 2, 3)).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None, None


class MovingAverageBatchNorm2d(BatchNormLike2d):
    """Moving Average Batch Normalization, MABN (Yan et al., ICLR 2020, arXiv 2001.06838).

    BatchNorm's gradient contains statistics of the batch, too, and in small batches these are as
    noisy as mean and variance. MABN replaces all of them by moving averages. Its only statistic of
    x is the second moment. With means over N, H and W, training computes::

        chi2_B = mean(x^2)
        chi2   = mean of chi2_B over the last ``window`` batches, this one included
        chi    = sqrt(chi2 + eps)
        r      = clip(chi / sqrt(running_var + eps), 1/5, 5)
        y      = weight r x / chi + bias
        running_var <- running_var + momentum (chi2 - running_var)

    and, with x_hat = x / chi and g = dL/dy weight r, the gradient of x is::

        psi_B = mean(g x_hat)
        psi   = mean of psi_B over the last ``window`` backward passes, this one included
        dx    = (g - x_hat psi) / chi

    This is not the derivative of y. The gradients of weight and bias are: the sums of dL/dy r x_hat
    and of dL/dy. Evaluation computes y = weight x / sqrt(running_var + eps) + bias, which is
    BatchNorm's with a running mean of 0: it can be frozen, folded and exported like BatchNorm.

    Averages need a history. During the first ``warmup_steps`` training steps, and at least the
    first ``window``, chi2 = chi2_B, and psi = psi_B during as many backward passes; during the
    first ``renorm_after`` steps r = 1. These are numbers of steps and not shares of the training,
    because an average needs a number of steps to forget its initial value.

    **No mean is subtracted.** Instead the convolution in front of the norm must have weights whose
    mean over input channels and kernel is 0, for each output channel ("weight centralization").
    :class:`refbn_d2.hooks.WeightCentralization` keeps them so during training, and the package's
    own trainer uses it. *A trainer of your own must take this hook.* For the same reason a network
    cannot start from weights of BatchNorm, which subtracts a mean: loading them is an error.

    **Activation checkpointing** repeats the forward pass during the backward pass, after the
    averages have been updated. The repeated pass uses chi and r of the first pass and does not
    update the averages again. This works for the last 32 calls of the layer before the backward
    pass.

    **torch.compile** leaves the training pass of this layer out of its graphs, and is an error with
    ``fullgraph=True``. In evaluation the layer is compiled like BatchNorm.

    Every backward pass counts, also one that is repeated by ``retain_graph=True``. The gradient
    cannot be differentiated again. With a gradient scaler (float16) the last gradients are scaled
    by the factors of their steps; values that are not finite, for which a scaler skips the step,
    are left out of the window. Processes have averages of their own, as they
    have running statistics of their own. An empty batch gives an empty output that is connected to
    the autograd graph, and updates nothing. Statistics are computed in float32 (float64 for float64
    input).

    Args:
        num_features: Number of channels C.
        eps: Constant added to the second moment.
        momentum: Weight of a batch in ``running_var``, 0.02 in the paper (there 0.98, the weight of
            the old value); None for a cumulative average.
        window: Number of batches in the other two averages, >= 1.
        warmup_steps, renorm_after: See above; both >= 0.
        affine, track_running_stats, device, dtype, bias: Same as in nn.BatchNorm2d.

    Raises:
        ValueError: If ``window`` < 1, if ``warmup_steps`` or ``renorm_after`` is negative, or if
            ``track_running_stats`` is False (training needs the moving averages).

    Buffers:
        running_mean: 0; see above.
        running_var: Moving average of the second moment.
        square_window, gradient_window: The last values of chi2_B and psi_B, shape (window, C). Step
            n writes row (n - 1) mod window.
        num_gradients_tracked: Number of values that ``gradient_window`` has received.
            ``num_batches_tracked`` is the one of ``square_window``. A state dict without windows
            sets both to 0.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: Optional[float] = 0.02,
        *,
        window: int = 16,
        warmup_steps: int = 100,
        renorm_after: int = 1000,
        track_running_stats: bool = True,
        device=None,
        dtype=None,
        **kwargs,
    ):
        if window < 1:
            raise ValueError(f"window must be >= 1, got {window}")
        if warmup_steps < 0 or renorm_after < 0:
            raise ValueError(
                f"warmup_steps and renorm_after must be >= 0, got {warmup_steps} and {renorm_after}"
            )
        if not track_running_stats:
            raise ValueError(
                "Moving Average Batch Normalization needs running statistics in training too: do "
                "not set track_running_stats=False"
            )
        factory = {"device": device, "dtype": dtype}
        super().__init__(num_features, eps, momentum, **factory, **kwargs)
        self.window = window
        self.warmup_steps = warmup_steps
        self.renorm_after = renorm_after
        self.register_buffer("square_window", torch.zeros(window, num_features, **factory))
        self.register_buffer("gradient_window", torch.zeros(window, num_features, **factory))
        count = torch.tensor(0, dtype=torch.long, device=device)
        self.register_buffer("num_gradients_tracked", count)
        self._recent = RecentPasses()

    @torch.jit.unused  # scripted models only evaluate
    def _forward_by_batch(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            # The gradient writes to buffers, which a compiled graph cannot. is_compiling() is
            # False in the call, because it is not compiled.
            return torch.compiler.disable(self._forward_by_batch)(x)
        check_channels(x, self.num_features)
        if x.numel() == 0:
            return self._normalize_by_running_stats(x)
        with torch.no_grad():
            square = x.detach().to(statistics_dtype(x)).square().mean(dim=(0, 2, 3))
            if in_backward():
                # The first pass has already updated the averages.
                chi, r = self._recent.recall(square, *self._scales(square))
            else:
                factor = count_batch(self)
                square_mean = self._average(self.square_window, self.num_batches_tracked, square)
                chi, r = self._scales(square_mean)
                self.running_var.lerp_(square_mean.to(self.running_var.dtype), factor)
                self._recent.remember(square, chi, r)
        return _Normalize.apply(x, self.weight, self.bias, chi, r, self)

    def _scales(self, square_mean: Tensor) -> Tuple[Tensor, Tensor]:
        """Returns chi and r of this training step, both of shape (C,)."""
        chi = torch.sqrt(square_mean + self.eps)
        r = chi / torch.sqrt(self.running_var.to(chi.dtype) + self.eps)
        # Decided on the device, because reading the step on the host would wait for the GPU.
        begun = self.num_batches_tracked > self.renorm_after
        return chi, torch.where(begun, r.clamp(1 / _R_MAX, _R_MAX), torch.ones_like(r))

    def _average(self, window: Tensor, step: Tensor, value: Tensor) -> Tensor:
        """Writes ``value`` to ``window`` and returns the mean, or ``value`` during the warm-up.

        Args:
            window: The buffer, shape (window, C).
            step: Number of values that the window has received, this one included, scalar.
            value: Shape (C,), without gradient.
        """
        row = ((step - 1) % self.window).view(1)
        new = value.to(window.dtype)[None]
        window.index_copy_(0, row, torch.where(new.isfinite(), new, window[row]))
        mean = window.to(value.dtype).mean(dim=0)
        return torch.where(step > max(self.window, self.warmup_steps), mean, value)

    def _average_gradient(self, value: Tensor) -> Tensor:
        self.num_gradients_tracked.add_(1)
        return self._average(self.gradient_window, self.num_gradients_tracked, value)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        mean = state_dict.get(prefix + "running_mean")
        if mean is not None and not mean.is_meta and mean.any():
            raise ValueError(
                f"{prefix}running_mean is not 0: these are weights of a norm that subtracts a "
                "mean, as BatchNorm does, and MABN subtracts none; start from weights that were "
                "trained with MABN, or from random ones"
            )
        names = _WINDOWS
        if prefix + "running_var" in state_dict:
            if any(prefix + name not in state_dict for name in _WINDOWS):
                # Statistics without windows: the warm-up begins again.
                names = (*_WINDOWS, "num_batches_tracked")
                for name in names:
                    state_dict[prefix + name] = torch.zeros_like(getattr(self, name))
        else:  # a state dict without statistics says nothing about them
            for name in names:
                state_dict.setdefault(prefix + name, getattr(self, name))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, window={self.window}, warmup_steps={self.warmup_steps}, "
            f"renorm_after={self.renorm_after}"
        )
