#!/usr/bin/env python3
"""Trains or evaluates an image classifier; the command line is detectron2's own.

    tools/train_classifier.py --config-file FILE --num-gpus 8 [--resume] [--eval-only] [KEY VALUE]

Without a GPU: --num-gpus 0 MODEL.DEVICE cpu
"""

from refbn_d2.classification import ClassificationTrainer
from refbn_d2.engine import train_command

if __name__ == "__main__":
    train_command(ClassificationTrainer, __doc__)
