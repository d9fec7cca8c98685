"""Training error and throughput in the log of a classifier's training."""

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

from ..log import get_logger
from .evaluator import errors

__all__ = ["TrainingProgress"]

logger = get_logger(__name__)


class TrainingProgress(HookBase):
    """Logs the training error and the throughput every ``period`` iterations.

    metrics.json gets train/top1_error and train/top5_error in percent, over all images of these
    iterations on all processes, each with the weights at its iteration; and images_per_second,
    which excludes the time of evaluations and checkpoints.

    Args:
        batch_size: Number of images per iteration on all processes together.
        period: Number of iterations between log entries. It must be the period of detectron2's
            writers, which ignore scalars of other iterations.
    """

    def __init__(self, batch_size: int, period: int = 20):
        self._batch_size, self._period = batch_size, period

    def after_step(self):
        next_iter = self.trainer.iter + 1
        if next_iter % self._period and next_iter != self.trainer.max_iter:
            return
        model = self.trainer.model
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        counts = model.counts.clone()
        model.counts.zero_()
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(counts)
        scalars = {f"train/{name}": value for name, value in errors(counts).items()}
        histories = self.trainer.storage.histories()
        text = ""
        if "time" in histories:  # detectron2 does not time the first iterations
            time = histories["time"].avg(self._period)
            waiting = histories["data_time"].avg(self._period) / time
            scalars["images_per_second"] = self._batch_size / time
            text = (
                f"  {scalars['images_per_second']:.0f} images/s, "
                f"{100 * waiting:.0f} % of the time waiting for them"
            )
        self.trainer.storage.put_scalars(smoothing_hint=False, **scalars)
        error = scalars["train/top1_error"]
        logger.info("iter: %d  training error: %.2f %%%s", next_iter, error, text)
