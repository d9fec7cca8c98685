"""Trains or evaluates a detector; the command line is detectron2's own.

    tools/train_net.py --config-file FILE --num-gpus 8 [--resume] [--eval-only] [KEY VALUE ...]

Without a GPU: --num-gpus 0 MODEL.DEVICE cpu
"""

from ..engine import Trainer, train_command

__all__ = ["main"]


def main() -> None:
    train_command(Trainer, __doc__)
