#!/usr/bin/env python3
"""Measures the time and memory of norms on this machine.

    dev/benchmark.py layers    single layers at the shapes of Mask R-CNN R50-C4 and ResNet-50
    dev/benchmark.py models    a training step and an inference of a detector with each norm

The norms take turns: in each round every norm runs once. Ratios are medians over rounds.
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

from refbn_d2 import get_config_file
from refbn_d2.benchmarks.norm_cost import (
    DETECTOR_SHAPES,
    RESNET_SHAPES,
    MeasuringEvalRefBatchNorm2d,
    PlainRefBatchNorm2d,
    SyncKernelsBatchNorm2d,
    compiled_ref_batch_norm,
    layer_times,
    model_times,
)
from refbn_d2.errors import UserError, one_line_errors
from refbn_d2.norms import RefBatchNorm2d
from refbn_d2.norms.table import NORM_TYPES

FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def geometric_mean(values) -> float:
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values))


def layers(args) -> dict:
    norms = {
        "BN": nn.BatchNorm2d,
        "RefBN": RefBatchNorm2d,
        "RefBN, plain formula": PlainRefBatchNorm2d,
        **{name: NORM_TYPES[name].build for name in ("EvalRefBN", "GN", "BRN", "SN")},
        "EvalRefBN, measuring": MeasuringEvalRefBatchNorm2d,
    }
    if args.device == "cuda":
        norms["BN, kernels of SyncBN"] = SyncKernelsBatchNorm2d
    if args.norms:
        known = {**{name: t.build for name, t in NORM_TYPES.items()}, **norms}
        known["RefBN, torch.compile"] = compiled_ref_batch_norm  # takes minutes to compile
        unknown = [name for name in args.norms if name not in known]
        if unknown:
            raise UserError(f"--norms {' '.join(unknown)}: known are {', '.join(known)}")
        norms = {name: known[name] for name in dict.fromkeys(["BN", *args.norms])}
    groups = {f"R50-C4, {n} images": s for n, s in DETECTOR_SHAPES.items()}
    groups.update({f"ResNet-50, batch {n}": s for n, s in RESNET_SHAPES.items()})
    cases = [(g, s, f) for g, shapes in groups.items() for s in shapes for f in args.layout]
    results = []
    for group, shape, layout in track(cases, console=Console(stderr=True)):
        times = layer_times(
            norms, shape, FORMATS[layout], DTYPES[args.dtype], args.repeats, args.device
        )
        results.append({"group": group, "shape": shape, "layout": layout, "norms": times})
    for layout in args.layout:
        part = [r for r in results if r["layout"] == layout]
        _print_layers(f"{args.dtype}, {layout}", part)
    return {"dtype": args.dtype, "layers": results}


def _print_layers(title: str, results: list) -> None:
    """Two tables of geometric means over shapes: by norm and pass, and by norm and network."""
    names = list(results[0]["norms"])

    def mean(name, what, key, part):
        return geometric_mean(r["norms"][name][what][key] for r in part)

    table = Table(title=f"{title}: time against BN and against the traffic floor")
    for column in ("norm", "forward", "backward", "both", "worst shape", "quartiles", "floor"):
        table.add_column(column, justify="left" if column == "norm" else "right")
    table.add_column("bytes kept, at most", justify="right")
    for name in names:
        worst = max(results, key=lambda r: r["norms"][name]["both"]["ratio"])
        median, low, high = (mean(name, "both", k, results) for k in ("median", "low", "high"))
        kept = max(r["norms"][name]["bytes_kept"] / r["norms"]["BN"]["bytes_kept"] for r in results)
        table.add_row(
            name,
            *(f"{mean(name, w, 'ratio', results):.2f}" for w in ("forward", "backward", "both")),
            f"{worst['norms'][name]['both']['ratio']:.2f} at {'x'.join(map(str, worst['shape']))}",
            f"{low / median - 1:+.0%} {high / median - 1:+.0%}",
            f"{mean(name, 'both', 'floor_ratio', results):.2f}",
            f"{kept:.3f}",
        )
    Console(width=140).print(table)
    table = Table(title=f"{title}: forward + backward against BN")
    table.add_column("shapes")
    for name in names:
        table.add_column(name, justify="right")
    for group in dict.fromkeys(r["group"] for r in results):
        part = [r for r in results if r["group"] == group]
        table.add_row(group, *(f"{mean(n, 'both', 'ratio', part):.2f}" for n in names))
    Console(width=140).print(table)


# For each model: config, the type of GN that fits its width, size of an image.
MODELS = {
    "quick": ("Quick/Base-mask_rcnn_R_50_C4_quick.yaml", "GN8", (128, 128)),
    "full": ("COCO-InstanceSegmentation/Base-live-1x.yaml", "GN", (800, 1216)),
}
# No files of weights are needed. From random weights a network with FrozenBN would diverge at a
# usual learning rate, so the rate is tiny.
MODEL_OPTS = ["MODEL.WEIGHTS", "", "SOLVER.BASE_LR", "1e-9", "MODEL.RESNETS.STRIDE_IN_1X1", "True"]


def models(args) -> dict:
    name, group_norm, size = MODELS[args.model]
    norms = ["BN", *(args.norms or ("RefBN", "EvalRefBN", "FrozenBN", group_norm))]
    opts = ["MODEL.DEVICE", args.device, *MODEL_OPTS]
    with Console(stderr=True).status("training steps and inferences"):
        results = model_times(get_config_file(name), norms, args.images, size, opts, args.repeats)
    table = Table(title=f"the {args.model} detector, {args.images} images a step, one an inference")
    for column in ("norm", "step (s)", "quartiles", "against BN", "inference (s)", "quartiles"):
        table.add_column(column, justify="left" if column == "norm" else "right")
    for column in ("against BN", "peak memory (MB)", "against BN"):
        table.add_column(column, justify="right")
    for norm, r in results.items():
        cells = []
        for what in ("step", "inference"):
            t = r[what]
            cells += [f"{t['median']:.3f}", f"{t['low']:.3f} to {t['high']:.3f}"]
            cells.append(f"{t['ratio']:.3f}")
        peak = f"{r['peak_bytes'] / 2**20:.0f}"
        share = f"{r['peak_bytes'] / results['BN']['peak_bytes']:.3f}"
        table.add_row(norm, *cells, peak, share)
    Console(width=140).print(table)
    return {"model": args.model, "images": args.images, "models": results}


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("layers", "models"))
    parser.add_argument(
        "--repeats", type=int, default=15, help="rounds, in each of which every norm runs once"
    )
    parser.add_argument("--norms", nargs="+", help="norms to measure besides BN; default: all")
    parser.add_argument("--layout", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--model", choices=MODELS, default="quick", help="detector to measure")
    parser.add_argument(
        "--images", type=int, default=4, help="images in a training step of the detector"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="file to write all numbers to")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = layers(args) if args.what == "layers" else models(args)
    machine = {"cpu": platform.processor() or platform.machine(), "threads": args.threads}
    if args.device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    if args.json:
        args.json.write_text(
            json.dumps({**machine, "torch": torch.__version__, **result}, indent=1)
        )


if __name__ == "__main__":
    main()
