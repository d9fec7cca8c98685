#!/usr/bin/env python3
"""Trains or evaluates a detector; the command line is detectron2's own.

    tools/train_net.py --config-file FILE --num-gpus 8 [--resume] [--eval-only] [KEY VALUE ...]

Without a GPU: --num-gpus 0 MODEL.DEVICE cpu
"""

from refbn_d2.engine import Trainer, train_command

if __name__ == "__main__":
    train_command(Trainer, __doc__)
