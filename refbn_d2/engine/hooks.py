"""Hooks of the training loop: capturing the reference, exact resume, showing progress."""

import json
import logging
import os
from typing import Any, Callable, Dict, List, Optional

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from tqdm import tqdm

from ..data.loader import TrainLoader
from ..reference import capture_reference, reference_layers
from ..rng import derived_seed, seed_rng

__all__ = ["EvalHook", "ExactResume", "ProgressBar", "ReferenceHook"]

logger = logging.getLogger(__name__)


class ReferenceHook(HookBase):
    """Captures the reference before the first step, and again every ``refresh_period`` iterations.

    A run that resumes has its reference from the checkpoint and keeps it.

    Args:
        load_batch: returns the reference batch, the same on every process and at every call.
        seed: what it was drawn with; also seeds the sampling in the forward pass.
        refresh_period: in iterations, 0 for never.
        output_dir: where ``reference.json`` goes.
    """

    def __init__(
        self,
        load_batch: Callable[[], List[Dict[str, Any]]],
        seed: int,
        refresh_period: int,
        output_dir: str,
    ):
        self._load_batch = load_batch
        self._seed = seed
        self._refresh_period = refresh_period
        self._output_dir = output_dir
        self._batch: Optional[List[Dict[str, Any]]] = None

    def before_train(self):
        if self.trainer.start_iter > 0:
            held = [m.has_reference for m in reference_layers(self.trainer.model).values()]
            logger.info("Kept the reference of %d of %d norms", sum(held), len(held))
            return
        self._capture()

    def before_step(self):
        if self._refresh_period > 0 and self.trainer.iter > 0:
            if self.trainer.iter % self._refresh_period == 0:
                self._capture()

    def _capture(self):
        batch = self._batch or self._load_batch()
        layers = capture_reference(self.trainer.model, batch, self._seed)
        if self._refresh_period > 0:
            self._batch = batch
        if self.trainer.iter > 0:
            return
        logger.info("Captured the reference of %d norms from %d images", len(layers), len(batch))
        if comm.is_main_process():
            record = {
                "image_ids": [d["image_id"] for d in batch],
                "m": len(batch),
                "seed": self._seed,
                "layers": layers,
            }
            PathManager.mkdirs(self._output_dir)
            with PathManager.open(os.path.join(self._output_dir, "reference.json"), "w") as f:
                json.dump(record, f, indent=1)


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


class ProgressBar(HookBase):
    """A progress bar with the time left and the loss; only where somebody looks at a terminal."""

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
