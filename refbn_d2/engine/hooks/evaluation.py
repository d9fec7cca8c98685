"""Evaluates during training and, if it got there, at its end."""

from detectron2.engine import hooks

__all__ = ["EvalHook"]


class EvalHook(hooks.EvalHook):
    """Upstream's, but at the end of training it evaluates only what was trained to the end.

    Upstream's also runs when the last step has failed or was stopped; on one process then, where
    the others do not, it hangs.
    """

    def after_train(self):
        if self.trainer.iter >= self.trainer.max_iter:
            # A run that resumes at its end counts one iteration too many.
            self.trainer.storage.iter = self.trainer.max_iter
            super().after_train()
