"""Counts the collective operations of a training step."""

from collections import Counter
from typing import Dict, Type

import torch
from detectron2.config import CfgNode
from torch.profiler import ProfilerActivity, profile

from ..engine.trainer import Trainer

__all__ = ["communication"]

# Not the first steps: the first one takes the reference, and after it DistributedDataParallel
# rebuilds its gradient buckets.
_STEP = 3


class _Profiled(Trainer):
    """Mixin of a trainer that profiles one step, including all hooks."""

    def before_step(self):
        if self.iter == _STEP:
            self.profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
            self.profiler.start()
        super().before_step()

    def after_step(self):
        super().after_step()
        if self.iter == _STEP:
            self.profiler.stop()


def communication(cfg: CfgNode, trainer_class: Type[Trainer] = Trainer) -> Dict[str, int]:
    """Counts the collective operations of one training step with PyTorch's profiler.

    Every process must call this function. It trains a few steps without an evaluation.

    Args:
        cfg: Config of the run. Files are written to its OUTPUT_DIR.
        trainer_class: Class of the trainer.

    Returns:
        A dict from the name of each operation ("all_reduce", ...) to the number of calls on this
        process, and from "elements" to the total number of elements of their inputs.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.MAX_ITER, cfg.DATASETS.TEST, cfg.TEST.EVAL_PERIOD = _STEP + 2, (), 0
    trainer = type("_ProfiledTrainer", (_Profiled, trainer_class), {})(cfg)
    trainer.train()
    found: Counter = Counter()
    for event in trainer.profiler.events():
        backend, _, name = event.name.partition(":")
        if backend in ("gloo", "nccl"):
            found[name] += 1
            found["elements"] += sum(torch.Size(s).numel() for s in event.input_shapes)
    return dict(found)
