"""What the processes of a run send to each other in a training step."""

from collections import Counter
from typing import Dict, Type

import torch
from detectron2.config import CfgNode
from torch.profiler import ProfilerActivity, profile

from ..engine.trainer import Trainer

__all__ = ["communication"]

# The first step takes the reference, and DistributedDataParallel sorts its gradients after it.
_STEP = 3


class _Profiled:
    """Of a trainer: records one step, all its hooks included."""

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
    """Counts the collective operations of one training step, as PyTorch's profiler sees them.

    Every process has to call this. It trains a few steps, without an evaluation.

    Args:
        cfg: of the run; what it writes goes to OUTPUT_DIR.
        trainer_class: what trains.

    Returns:
        Name ("all_reduce", ...) -> calls, and "elements" -> the sum of their inputs' sizes on this
        process.
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
