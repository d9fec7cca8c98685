"""Converts a ResNet's weights to a file from which a detector starts (MODEL.WEIGHTS), or back.

    refbn-d2 convert output/imagenet/refbn/model_final.pth backbone.pth
    refbn-d2 convert resnet50.pth backbone.pth --frozen
    refbn-d2 convert output/detector/model_final.pth resnet50.pth --to torchvision

SRC is a checkpoint of `refbn-d2 classify` or `refbn-d2 train`, a state dict of a ResNet of
torchvision or timm (.pth or .safetensors), or a detectron2 backbone (.pth, .pkl or detectron2://).
Code in the file is not executed.
"""

import argparse
import re
from itertools import groupby

import yaml

from ..errors import UserError, one_line_errors
from ..weights.convert import FORMATS, NORMS, Conversion, convert


def matched(conversion: Conversion) -> str:
    """Describes the conversion: a line per stage with its first weight and number of tensors."""
    # "res2.0.conv1.weight" or "layer1.0.conv1.weight": the stage is the first part.
    groups = groupby(conversion.names.items(), lambda pair: pair[1].split(".")[0])
    rows = [list(group) for _, group in groups]
    width = max(len(row[0][0]) for row in rows)
    target_width = max(len(row[0][1]) for row in rows)
    lines = [
        f"  {row[0][0]:{width}}  ->  {row[0][1]:{target_width}}  {len(row):4} tensors"
        for row in rows
    ]
    if conversion.left_out:
        # Only the name of the head: the part before the number of a layer or the weight's name.
        parts = dict.fromkeys(re.split(r"\.\d|\.\w+$", n)[0] for n in conversion.left_out)
        shown = ", ".join(list(parts)[:5]) + (", ..." if len(parts) > 5 else "")
        lines.append(f"  left out: {len(conversion.left_out)} tensors ({shown})")
    return "\n".join(lines)


def needed_config(config: dict) -> str:
    """Returns the YAML that the config of a detector needs for the file."""
    tree: dict = {}
    for key, value in config.items():
        *path, last = key.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    text = yaml.safe_dump(tree, default_flow_style=None, sort_keys=False)
    if config.get("MODEL.RESNETS.NORM") == "RefBN":
        text += "# SyncRefBN and VBN have the same tensors: set NORM as in the training of SRC.\n"
    if "INPUT" not in tree:
        text += (
            "# Set PIXEL_MEAN, PIXEL_STD, INPUT.FORMAT and RESNETS.STRIDE_IN_1X1 as in the training"
            " of SRC, which does not contain them.\n"
        )
    return text


@one_line_errors
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("src", metavar="SRC", help="weights to read")
    parser.add_argument("dst", metavar="DST", help=".pth file to write")
    parser.add_argument(
        "--norm",
        choices=NORMS,
        help="norm to which BN, RefBN or EvalRefBN is converted, the detector's "
        "MODEL.RESNETS.NORM; default: no conversion. RefBN's reference and EvalRefBN's weights of "
        "an image's own statistics are dropped; FrozenBN is the same as --frozen. Other norms "
        "cannot be converted",
    )
    parser.add_argument(
        "--frozen",
        action="store_true",
        help="fold each norm's running statistics into an affine map, for FrozenBN",
    )
    parser.add_argument(
        "--to",
        choices=FORMATS,
        default=FORMATS[0],
        help="torchvision: write a state dict for torchvision's or timm's ResNet",
    )
    parser.add_argument(
        "--key",
        default="",
        help="key of the weights to convert if a checkpoint has several, such as model_ema",
    )
    args = parser.parse_args()
    if args.frozen and args.norm not in (None, "FrozenBN"):
        raise UserError(f"--frozen with --norm {args.norm}: a frozen norm is FrozenBN; use one")
    norm = "FrozenBN" if args.frozen else args.norm
    conversion = convert(args.src, args.dst, norm, args.to, args.key)
    print(f"{args.src} -> {args.dst} ({conversion.taken})\n{matched(conversion)}")
    print(f"norm: {conversion.norm or 'not BatchNorm; unchanged'}")
    if args.to == "detectron2":
        print(
            f"\nA detector that starts from it needs this in its config:\n\n"
            f"{needed_config(conversion.config)}",
            end="",
        )
