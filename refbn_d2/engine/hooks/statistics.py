"""Recomputes the inference statistics before evaluations."""

from typing import Callable

from detectron2.engine import HookBase

__all__ = ["StatisticsHook"]


class StatisticsHook(HookBase):
    """Recomputes the inference statistics before evaluations and at the end of training.

    Takes the place of detectron2's PreciseBN hook, with its config keys TEST.PRECISE_BN.

    Args:
        period: in iterations, 0 for the end only.
        recompute: does it.
    """

    def __init__(self, period: int, recompute: Callable[[], None]):
        self._period, self._recompute = period, recompute

    def after_step(self):
        next_iter = self.trainer.iter + 1
        last = next_iter == self.trainer.max_iter
        if last or (self._period > 0 and next_iter % self._period == 0):
            self._recompute()
