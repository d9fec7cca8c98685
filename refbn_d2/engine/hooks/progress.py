"""Shows the progress of training."""

from typing import Optional

from detectron2.engine import HookBase
from tqdm import tqdm

__all__ = ["ProgressBar"]


class ProgressBar(HookBase):
    """Progress bar with the remaining time and the loss; shown only if stderr is a terminal."""

    _bar: Optional[tqdm] = None

    def before_train(self):
        self._bar = tqdm(
            total=self.trainer.max_iter,
            initial=self.trainer.start_iter,
            unit="it",
            dynamic_ncols=True,
            disable=None,
        )

    def after_step(self):
        self._bar.update()
        if self.trainer.iter % 20 == 0 and not self._bar.disable:
            losses = self.trainer.storage.histories().get("total_loss")
            if losses is not None:
                self._bar.set_postfix(loss=f"{losses.median(20):.3f}")

    def after_train(self):
        if self._bar is not None:  # else a hook before this one failed
            self._bar.close()
