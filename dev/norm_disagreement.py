#!/usr/bin/env python3
"""Measures how much evaluation differs from training in each layer of finished EvalRefBN runs.

    dev/norm_disagreement.py output/small_batches/EvalRefBN/*/seed4 --output disagreement.png

Training batches pass through the network in training mode. At each norm the same input is also
evaluated, by running statistics alone (BN) and with the image's own statistics (EvalRefBN). The
disagreement is E[(y_train - y_eval)^2] / E[y_train^2] of the normalized values, before weight and
bias. EvalRefBN trains like BN, so both have the same y_train.
"""

import argparse
from pathlib import Path
from typing import Dict, List, Tuple

import matplotlib
import numpy as np
import torch
from detectron2.utils.events import EventStorage

from refbn_d2.config import load_config
from refbn_d2.engine import Trainer
from refbn_d2.errors import UserError, one_line_errors
from refbn_d2.io.json import read_json
from refbn_d2.norms import EvalRefBatchNorm2d

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

KINDS = ("BN", "EvalRefBN")
FLOOR = 1e-3  # lower end of the plot; smaller values are drawn there


def normalized(x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor, eps: float) -> torch.Tensor:
    return (x - mean[..., None, None]) / (var[..., None, None] + eps).sqrt()


@torch.no_grad()
def measure(run: Path, num_batches: int) -> Dict[str, Tuple[float, float, float]]:
    """layer -> (disagreement of BN, of EvalRefBN, weight of an image's own statistics)."""
    cfg = load_config(str(run / "config.yaml"), ["OUTPUT_DIR", str(run), "MODEL.DEVICE", "cpu"])
    model = Trainer.build_model(cfg)
    Trainer.build_checkpointer(cfg, model).load(str(run / "model_final.pth"))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, EvalRefBatchNorm2d)}
    if not layers:
        raise UserError(f"{run}: its model has no EvalRefBN")
    sums = {name: np.zeros(3) for name in layers}

    def watch(name: str, m: EvalRefBatchNorm2d):
        running, w = (m.running_mean.clone(), m.running_var.clone()), float(m.own_weight)

        def add(_module, inputs, _output) -> None:
            x = inputs[0]
            var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
            own_var, own_mean = torch.var_mean(x, dim=(2, 3), correction=0)
            trained = normalized(x, mean, var, m.eps)
            mixed = [w * own + (1 - w) * r for own, r in zip((own_mean, own_var), running)]
            for column, statistics in enumerate((running, mixed)):
                evaluated = normalized(x, *statistics, m.eps)
                sums[name][column] += float((trained - evaluated).square().mean())
            sums[name][2] += float(trained.square().mean())

        return m.register_forward_hook(add)

    for name, m in layers.items():
        watch(name, m)
    with EventStorage():
        for _, batch in zip(range(num_batches), Trainer.build_train_loader(cfg)):
            model.train()(batch)
    return {
        name: (s[0] / s[2], s[1] / s[2], float(layers[name].own_weight))
        for name, s in sums.items()
        if s[2] > 0
    }


def figure(found: List[Tuple[str, Dict[str, Tuple[float, float, float]]]]):
    fig, axes = plt.subplots(len(found), 1, figsize=(9, 2.1 * len(found)), sharex=True)
    for ax, (title, layers) in zip(np.atleast_1d(axes), found):
        values = np.array(list(layers.values()))
        for column, (kind, color) in enumerate(zip(KINDS, ("#b0413e", "#2b6ca3"))):
            heights = values[:, column].clip(min=FLOOR)
            ax.plot(heights, color=color, label=kind, linewidth=1.6, clip_on=False)
        ax.set_yscale("log")
        ax.set_ylim(FLOOR, 2)
        ax.set_title(title, fontsize=9, loc="left")
        ax.grid(alpha=0.3)
        ticks = [n for n, name in enumerate(layers) if n == 0 or name.endswith(".0.conv1.norm")]
        names = [list(layers)[n].replace("backbone.", "").replace("roi_heads.", "") for n in ticks]
        ax.set_xticks(ticks, [name.split(".")[0] for name in names], rotation=30, fontsize=8)
    np.atleast_1d(axes)[0].legend(fontsize=8, loc="upper right")
    fig.supylabel("disagreement of evaluation with training", fontsize=9)
    fig.tight_layout()
    return fig


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs of EvalRefBN")
    parser.add_argument("--num-batches", type=int, default=16, help="training batches")
    parser.add_argument("--output", type=Path, required=True, help="PNG")
    args = parser.parse_args()
    found = []
    for run in args.runs:
        layers = measure(run, args.num_batches)
        record = read_json(run / "run.json")
        kind = "batches of one group" if record["grouping"] else "random batches"
        count = record["ims_per_batch"]
        found.append((f"{count} image{'s' * (count != 1)} a batch, {kind}", layers))
        first, *rest = layers.items()
        for name, (bn, ours, w) in (
            first,
            ("mean of the others", np.mean([r for _, r in rest], 0)),
        ):
            print(f"{run}: {name}: BN {bn:.3f}, EvalRefBN {ours:.3f}, weight {w:.2f}", flush=True)
    figure(found).savefig(args.output, dpi=100)


if __name__ == "__main__":
    main()
