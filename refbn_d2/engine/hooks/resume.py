"""Makes a resumed run continue exactly like a run that was not interrupted."""

from typing import Any, Dict

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

from ...data.loader import TrainLoader
from ...rng import derived_seed, seed_rng

__all__ = ["ExactResume"]


class ExactResume(HookBase):
    """Makes a resumed run equal to one that was not interrupted, bit for bit on a CPU.

    detectron2's checkpoint contains weights, optimizer and schedule. This hook adds:

    * Random numbers. In each iteration they depend only on the seed of the run and the iteration,
      and so do the images. The checkpoint contains the seed, so this also works without SEED.
    * Scalars. The checkpoint contains those of the last iterations, whose medians are logged, and
      those that have not been logged yet.
    * Evaluation and logging of the iteration of the checkpoint, which follow the checkpoint. The
      resumed run begins with them, unless metrics.json shows that they were done.

    Args:
        loader: Training loader of the trainer.
    """

    # Number of values of which the writers log the median.
    _WINDOW = 20
    # Times are not restored, because those of the interrupted process do not apply to this one.
    _TIMES = ("data_time", "eta_seconds", "rank_data_time", "time")

    def __init__(self, loader: TrainLoader):
        self._loader = loader
        self._scalars: Dict[str, Any] = {}

    def state_dict(self) -> Dict[str, Any]:
        state: Dict[str, Any] = {"seed": self._loader.seed}
        storage = getattr(self.trainer, "storage", None)  # it does not exist before training
        if storage is None or self.trainer.metrics is None:
            return state
        state["scalars"] = scalars = {}
        logged = self.trainer.metrics.last_iteration
        for name, smooth in storage.smoothing_hints().items():
            values = storage.history(name).values()[-self._WINDOW if smooth else -1 :]
            if name not in self._TIMES and (smooth or values[-1][1] > logged):
                scalars[name] = smooth, values
        return state

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self._loader.seed = state["seed"]
        self._scalars = state.get("scalars", {})  # older checkpoints have none

    def before_train(self):
        self._loader.start = self.trainer.start_iter
        if self.trainer.start_iter > 0:
            storage = self.trainer.storage
            for name, (smooth, values) in self._scalars.items():
                for value, iteration in values:
                    storage.iter = iteration  # put_scalar of detectron2 0.6 has no such argument
                    storage.put_scalar(name, value, smoothing_hint=smooth)
            self._finish_iteration()

    def _finish_iteration(self):
        trainer = self.trainer
        trainer.iter = trainer.storage.iter = trainer.start_iter - 1
        if comm.is_main_process() and trainer.start_iter >= trainer.max_iter:
            trainer.save_final()
        logged = trainer.metrics is not None and trainer.metrics.last_iteration >= trainer.iter
        if not comm.all_gather(logged)[0]:
            for hook in trainer._hooks:
                if isinstance(hook, (hooks.EvalHook, hooks.PeriodicWriter)):
                    hook.after_step()
        trainer.iter = trainer.storage.iter = trainer.start_iter

    def before_step(self):
        # The key has one element more than the loader's keys, so the seeds differ from those of
        # images.
        seed_rng(derived_seed(self._loader.seed, comm.get_rank(), self.trainer.iter, 0))
