"""Captures the reference before the first step."""

import itertools
import json
import os
from typing import Any, Callable, Dict, Iterable, List, Optional

from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from ...io.atomic import atomic_write
from ...log import get_logger
from ...statistics.reference import capture_reference, reference_layers

__all__ = ["ReferenceHook", "global_batch"]

logger = get_logger(__name__)


def global_batch(loader: Iterable[List[Dict[str, Any]]]) -> List[Dict[str, Any]]:
    """Concatenates the first batches of the training loaders of all processes.

    Every process must call this function and gets the same batch.

    Args:
        loader: Loader of lists of dicts with "image" of shape (C, H, W), as detectron2's. Each
            process takes one batch from its loader.
    """
    return list(itertools.chain(*comm.all_gather(next(iter(loader)))))


class ReferenceHook(HookBase):
    """Captures the reference before the first step, and again every ``refresh_period`` iterations.

    A resumed run keeps the reference of its checkpoint.

    Args:
        load_batch: Function that returns the reference batch, the same on every process and in
            every call.
        seed: Seed with which the batch was drawn. It also seeds the sampling in the forward pass.
        refresh_period: Number of iterations between captures; 0 to capture only once.
        output_dir: Folder of ``reference.json``, which lists the images; "" to write no file.

    Example, in a training script of your own or detectron2's ``lazyconfig_train_net.py``::

        trainer.register_hooks([ReferenceHook(lambda: global_batch(train_loader))])
    """

    def __init__(
        self,
        load_batch: Callable[[], List[Dict[str, Any]]],
        seed: int = 0,
        refresh_period: int = 0,
        output_dir: str = "",
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
        if self._output_dir and comm.is_main_process():
            record = {
                "image_ids": [d.get("image_id") for d in batch],
                "m": len(batch),
                "seed": self._seed,
                "layers": layers,
            }
            path = os.path.join(self._output_dir, "reference.json")
            PathManager.mkdirs(self._output_dir)
            write = PathManager.open if "://" in path else atomic_write
            with write(path, "w") as f:
                json.dump(record, f, indent=1)
