"""Trains or evaluates an image classifier; the command line is detectron2's own.

    refbn-d2 classify --config-file FILE --num-gpus 8 [--resume] [--eval-only] [KEY VALUE ...]

FILE is a path, or the name of a config that comes with the package, such as
MNIST/lenet5_refbn.yaml.
Without a GPU: --num-gpus 0 MODEL.DEVICE cpu
"""

from ..classification import ClassificationTrainer
from ..engine import train_command

__all__ = ["main"]


def main() -> None:
    train_command(ClassificationTrainer, __doc__)
