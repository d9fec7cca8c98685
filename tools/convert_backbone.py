#!/usr/bin/env python3
"""Turns a classifier's checkpoint into the weights a detector starts from (MODEL.WEIGHTS).

tools/convert_backbone.py SRC.pth DST.pth
"""

import argparse
import os

import torch

from refbn_d2.classification.convert import detector_weights
from refbn_d2.errors import UserError, one_line_errors


@one_line_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("src", help="checkpoint of tools/train_classifier.py")
    parser.add_argument("dst", help="file to write")
    args = parser.parse_args()
    try:
        checkpoint = torch.load(args.src, map_location="cpu", weights_only=True)
    except Exception as e:
        raise UserError(f"{args.src}: not a checkpoint that can be read safely: {e}") from None
    weights = detector_weights(checkpoint.get("model", {}))
    if not weights:
        raise UserError(f"{args.src}: no weights of a classifier's backbone in it")
    torch.save({"model": weights}, args.dst + ".partial")
    os.replace(args.dst + ".partial", args.dst)
    print(f"{len(weights)} tensors: {args.src} -> {args.dst}")


if __name__ == "__main__":
    main()
