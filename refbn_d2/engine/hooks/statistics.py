"""Recomputes the inference statistics before evaluations."""

from typing import Callable

from detectron2.engine import HookBase

__all__ = ["StatisticsHook"]


class StatisticsHook(HookBase):
    """Recomputes the inference statistics before evaluations and at the end of training.

    It replaces detectron2's PreciseBN hook and uses the same config keys, TEST.PRECISE_BN.

    Args:
        period: Number of iterations between recomputations; 0 for the end of training only.
        recompute: Function that recomputes the statistics.
    """

    def __init__(self, period: int, recompute: Callable[[], None]):
        self._period, self._recompute = period, recompute

    def after_step(self):
        next_iter = self.trainer.iter + 1
        last = next_iter == self.trainer.max_iter
        if last or (self._period > 0 and next_iter % self._period == 0):
            self._recompute()
