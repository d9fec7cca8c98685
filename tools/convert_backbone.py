#!/usr/bin/env python3
"""Turns a classifier's checkpoint into the weights a detector starts from (MODEL.WEIGHTS).

tools/convert_backbone.py SRC.pth DST.pth
"""

import argparse

from refbn_d2.classification.convert import convert
from refbn_d2.errors import one_line_errors


@one_line_errors
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("src", help="checkpoint of tools/train_classifier.py")
    parser.add_argument("dst", help="file to write")
    args = parser.parse_args()
    count = convert(args.src, args.dst)
    print(f"{count} tensors: {args.src} -> {args.dst}")


if __name__ == "__main__":
    main()
