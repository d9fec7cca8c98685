"""Lets an interrupted run go on as if nothing had happened."""

from typing import Any, Dict

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

from ...data.loader import TrainLoader
from ...rng import derived_seed, seed_rng

__all__ = ["ExactResume"]


class ExactResume(HookBase):
    """Lets a run that was interrupted go on as if nothing had happened, bit for bit on a CPU.

    Weights, optimizer and schedule are in detectron2's checkpoint. What is missing is

    * chance: here every iteration's random numbers depend on the run's seed and the iteration
      alone, and so do the images it gets. The seed is in the checkpoint, hence this works without
      SEED, too;
    * the scalars of the last iterations, whose medians are logged, and those not logged yet;
    * what comes after a checkpoint in its iteration: evaluating and logging it. The resumed run
      begins with that, unless metrics.json shows that it was done.

    Args:
        loader: the trainer's.
    """

    # As many values as the writers take the median of.
    _WINDOW = 20
    # What another process took says nothing about this one.
    _TIMES = ("data_time", "eta_seconds", "rank_data_time", "time")

    def __init__(self, loader: TrainLoader):
        self._loader = loader
        self._scalars: Dict[str, Any] = {}

    def state_dict(self) -> Dict[str, Any]:
        state: Dict[str, Any] = {"seed": self._loader.seed}
        storage = getattr(self.trainer, "storage", None)  # there is none before training
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
                    storage.iter = iteration  # release 0.6 does not take it as an argument
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
        # The loader's keys are shorter: no step repeats the random numbers of an image.
        seed_rng(derived_seed(self._loader.seed, comm.get_rank(), self.trainer.iter, 0))
