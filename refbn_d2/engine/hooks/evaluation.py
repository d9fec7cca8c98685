"""Evaluates during training and at the end of complete training."""

from detectron2.engine import hooks

__all__ = ["EvalHook"]


class EvalHook(hooks.EvalHook):
    """Upstream's EvalHook, but it evaluates at the end only if all iterations were completed.

    Upstream also evaluates if the last step failed or was stopped. If that happened on one process
    only, the evaluation would wait forever for the others.
    """

    def after_train(self):
        if self.trainer.iter >= self.trainer.max_iter:
            # In a run that resumes after the last iteration, the storage is one iteration ahead.
            self.trainer.storage.iter = self.trainer.max_iter
            super().after_train()
