#!/usr/bin/env python3
"""What a norm costs on this machine's CPU, in one interleaved run.

    tools/benchmark.py layers    single layers at the shapes of Mask R-CNN R50-C4 and ResNet-50
    tools/benchmark.py models    training steps of the quick detector with each norm

Ratios are medians over rounds in which every norm ran once.
"""

import argparse
import json
import math
import os
import platform
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from refbn_d2.benchmark import (
    DETECTOR_SHAPES,
    RESNET_SHAPES,
    PlainRefBatchNorm2d,
    layer_times,
    model_steps,
)
from refbn_d2.errors import one_line_errors
from refbn_d2.registry import NORMS

CONFIGS = Path(__file__).parents[1] / "configs"
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def geometric_mean(values) -> float:
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values))


def layers(args) -> dict:
    norms = {
        "BN": nn.BatchNorm2d,
        "RefBN": NORMS["RefBN"],
        "RefBN, plain formula": PlainRefBatchNorm2d,
        "GN": lambda channels: nn.GroupNorm(32, channels),
        "BRN": NORMS["BRN"],
        "SN": NORMS["SN"],
    }
    groups = {f"R50-C4, {n} images": s for n, s in DETECTOR_SHAPES.items()}
    groups.update({f"ResNet-50, batch {n}": s for n, s in RESNET_SHAPES.items()})
    cases = [(g, s, f) for g, shapes in groups.items() for s in shapes for f in args.layout]
    results = []
    for group, shape, layout in track(cases, console=Console(stderr=True)):
        times = layer_times(norms, shape, FORMATS[layout], DTYPES[args.dtype], args.repeats)
        results.append({"group": group, "shape": shape, "layout": layout, "norms": times})
    for layout in args.layout:
        table = Table(title=f"{args.dtype}, {layout}: forward + backward against BN")
        table.add_column("shapes")
        for name in norms:
            table.add_column(name, justify="right")
        table.add_column("BN / floor", justify="right")
        table.add_column("RefBN / floor", justify="right")
        rows = [*groups, "all"]
        for group in rows:
            part = [
                r["norms"]
                for r in results
                if r["layout"] == layout and group in (r["group"], "all")
            ]
            cells = [f"{geometric_mean(p[n]['ratio'] for p in part):.2f}" for n in norms]
            for n in ("BN", "RefBN"):
                cells.append(f"{geometric_mean(p[n]['floor_ratio'] for p in part):.2f}")
            table.add_row(group, *cells)
        worst = max(
            (r for r in results if r["layout"] == layout),
            key=lambda r: r["norms"]["RefBN"]["ratio"],
        )
        kept = max(
            r["norms"]["RefBN"]["bytes_kept"] / r["norms"]["BN"]["bytes_kept"]
            for r in results
            if r["layout"] == layout
        )
        Console(width=140).print(table)
        print(f"RefBN's worst shape: {worst['norms']['RefBN']['ratio']:.2f} at {worst['shape']}")
        print(f"bytes kept for backward, RefBN / BN at most: {kept:.4f}")
    return {"dtype": args.dtype, "layers": results}


def models(args) -> dict:
    name = CONFIGS / "Quick" / "mask_rcnn_R_50_C4_quick_{}.yaml"
    configs = {n: str(name).format(n.lower()) for n in ("BN", "RefBN", "FrozenBN", "GN")}
    # From random weights a FrozenBN network would diverge within the run.
    opts = ["SOLVER.IMS_PER_BATCH", str(args.images), "SOLVER.BASE_LR", "1e-9"]
    results = model_steps(configs, opts, args.repeats)
    table = Table(title=f"training step of the quick detector, {args.images} images")
    for column in ("norm", "step (s)", "quartiles", "against BN", "peak memory (MB)", "against BN"):
        table.add_column(column, justify="left" if column == "norm" else "right")
    for norm, r in results.items():
        step = r["step"]
        table.add_row(
            norm,
            f"{step['median']:.3f}",
            f"{step['low']:.3f} to {step['high']:.3f}",
            f"{r['ratio']:.2f}",
            f"{r['peak_bytes'] / 2**20:.0f}",
            f"{r['peak_bytes'] / results['BN']['peak_bytes']:.2f}",
        )
    Console(width=120).print(table)
    return {"models": results}


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("layers", "models"))
    parser.add_argument("--repeats", type=int, default=15, help="rounds")
    parser.add_argument("--layout", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--images", type=int, default=4, help="images a step, for models")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="file for all numbers")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = layers(args) if args.what == "layers" else models(args)
    machine = {"cpu": platform.processor() or platform.machine(), "threads": args.threads}
    if args.json:
        args.json.write_text(
            json.dumps({**machine, "torch": torch.__version__, **result}, indent=1)
        )


if __name__ == "__main__":
    main()
