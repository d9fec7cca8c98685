"""Keeps the weights in front of MABN centered."""

from typing import Dict, List

import torch
from detectron2.engine import HookBase
from torch import nn

from ...log import get_logger
from ...norms import MovingAverageBatchNorm2d

__all__ = ["WeightCentralization", "center_weights"]

logger = get_logger(__name__)


def _convolutions(model: nn.Module) -> Dict[str, nn.Conv2d]:
    """The convolutions whose ``norm`` is MABN, by name."""
    return {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, nn.Conv2d)
        and isinstance(getattr(m, "norm", None), MovingAverageBatchNorm2d)
        # A single weight minus its mean would be 0.
        and m.weight[0].numel() > 1
    }


@torch.no_grad()
def center_weights(model: nn.Module) -> List[str]:
    """Subtracts from the weights of each output channel their mean, in front of MABN.

    Args:
        model: Model that is changed in place: its convolutions whose ``norm`` is MABN, as
            detectron2's have it.

    Returns:
        Names of these convolutions.
    """
    convolutions = _convolutions(model)
    for conv in convolutions.values():
        conv.weight.sub_(conv.weight.mean(dim=(1, 2, 3), keepdim=True))
    return list(convolutions)


class WeightCentralization(HookBase):
    """Keeps the weights of convolutions centered whose ``norm`` is MABN (Yan et al. 2020).

    MABN subtracts no mean from its input. Instead the convolution in front of it computes with
    W - mean(W), where the mean is over input channels and kernel, for each output channel ("weight
    centralization"). This hook subtracts the mean from the weights themselves, before the first
    step and after each step of the optimizer. For SGD with momentum and weight decay this is the
    same training: subtracting the mean is a linear projection P, the gradient of W in P W is P
    times the gradient of P W, and momentum and weight decay are linear, too. It is not the same
    where the step is not linear in the gradient: clipping by norm and Adam see the gradient
    without P. At inference the weights need no treatment.

    The package's own trainer has this hook if the model has MABN. A trainer of your own must take
    it, before the hooks that evaluate or write checkpoints; a training loop without hooks calls
    :func:`center_weights` instead. A resumed run continues with the weights of its checkpoint.

    Convolutions are recognized by their attribute ``norm``, as detectron2's have it. A warning
    names the MABN layers that do not belong to one: nothing removes the mean of their inputs.

    Example::

        trainer.register_hooks([WeightCentralization()])
    """

    def before_train(self):
        model = self.trainer.model
        convolutions = _convolutions(model)
        if self.trainer.start_iter == 0:
            center_weights(model)
        logger.info("Weights of %d convolutions in front of MABN are centered", len(convolutions))
        served = {conv.norm for conv in convolutions.values()}
        left = [
            name
            for name, m in model.named_modules()
            if isinstance(m, MovingAverageBatchNorm2d) and m not in served
        ]
        if left:
            logger.warning(
                "%d MABN layers are not the norm of a convolution with weights to center, and "
                "nothing removes the mean of their inputs: %s",
                len(left),
                ", ".join(left),
            )

    def after_step(self):
        center_weights(self.trainer.model)
