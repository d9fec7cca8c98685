"""Trains or evaluates a detector; the command line is detectron2's own.

    refbn-d2 train --config-file FILE --num-gpus 8 [--resume] [--eval-only] [KEY VALUE ...]

FILE is a path, or the name of a config that comes with the package, such as
COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x_refbn.yaml.
Without a GPU: --num-gpus 0 MODEL.DEVICE cpu
"""

from ..engine import Trainer, train_command

__all__ = ["main"]


def main() -> None:
    train_command(Trainer, __doc__)
