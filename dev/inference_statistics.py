#!/usr/bin/env python3
"""Evaluates finished runs with other inference statistics, to see which ones are best.

    dev/inference_statistics.py output/study --name RefBN --output output/statistics

Each run of that name is evaluated three times: as trained (moving averages of the mixed
statistics), with mixed statistics recomputed from training batches (Algorithm 3), and with plain
batch statistics. With --as-norm they are evaluated once, converted to another norm:

    dev/inference_statistics.py output/study --name EvalRefBN --as-norm BN --output output/study

EvalRefBN trains like BN, bit for bit, so this evaluates the same trainings as BN. The results are
run folders for `refbn-d2 compare report --runs`.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

from detectron2.utils.logger import setup_logger
from tqdm import tqdm

from refbn_d2.config import load_config
from refbn_d2.engine import Trainer
from refbn_d2.errors import UserError, one_line_errors
from refbn_d2.io.json import read_json
from refbn_d2.norms import convert_norm
from refbn_d2.statistics.inference import recompute_statistics

KINDS = {"as trained": None, "mixed, recomputed": False, "plain, recomputed": True}


def evaluate(run: Path, target: Path, plain, num_batches: int, device: str, norm: str) -> None:
    opts = ["OUTPUT_DIR", str(target), "MODEL.DEVICE", device]
    cfg = load_config(str(run / "config.yaml"), opts)
    model = Trainer.build_model(cfg)
    Trainer.build_checkpointer(cfg, model).load(str(run / "model_final.pth"))
    if norm:
        convert_norm(model, norm)
    elif plain is not None:
        recompute_statistics(model, Trainer.build_train_loader(cfg), num_batches, plain)
    Trainer.test(cfg, model)


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, help="a folder below which there are run folders")
    parser.add_argument("--name", default="RefBN", help="of the runs to evaluate")
    parser.add_argument("--num-batches", type=int, default=100, help="to recompute from")
    parser.add_argument("--as-norm", default="", metavar="NORM", help="convert to it; no kinds")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, required=True, help="folder of the new run folders")
    args = parser.parse_args()
    setup_logger(str(args.output / "log.txt"), name="detectron2", abbrev_name="d2")
    found = {f.parent: read_json(f) for f in sorted(args.runs.rglob("run.json"))}
    runs = {
        folder: record
        for folder, record in found.items()
        if isinstance(record, dict)
        and record.get("name") == args.name
        and record.get("status") == "finished"
    }
    if not runs:
        raise UserError(f"{args.runs}: no finished run named {args.name!r} below it")
    kinds = [args.as_norm] if args.as_norm else list(KINDS)
    jobs = [(folder, record, kind) for folder, record in runs.items() for kind in kinds]
    for folder, record, kind in tqdm(jobs, disable=None):
        label = kind.replace(", ", "_").replace(" ", "_")
        target = args.output / label / folder.relative_to(args.runs)
        if (target / "run.json").exists():
            continue
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        plain = KINDS.get(kind)
        evaluate(folder, partial, plain, args.num_batches, args.device, args.as_norm)
        changes = {"name": args.as_norm, "norm": args.as_norm}
        if not args.as_norm:
            changes = {"name": f"{args.name}, {kind}"}
        (partial / "run.json").write_text(json.dumps({**record, **changes}, indent=1))
        os.replace(partial, target)


if __name__ == "__main__":
    main()
