"""Reproduces the paper's Table 3: pretrains, converts, trains detectors and writes the report.

    refbn-d2 reproduce-table3 --dry-run      list the steps and estimate the time
    refbn-d2 reproduce-table3                8 GPUs, COCO and ImageNet below DETECTRON2_DATASETS
    refbn-d2 reproduce-table3 --miniature    every step in minutes on two CPU cores

Protocol A freezes backbones that were pretrained with BN or RefBN; protocol B trains BN and RefBN
in the detector. After an interruption the same command continues. See docs/reproduce.md.
"""

import argparse
import dataclasses
from collections import defaultdict
from pathlib import Path
from typing import Dict, List, Optional

from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from .. import classification  # noqa: F401  (registers its data sets)
from ..config_files import find_config
from ..errors import UserError, one_line_errors
from ..experiments.matrix import RunSpec, check_seeds, load_matrix
from ..experiments.plan import check_data, measured_rates, planned_trainings
from ..experiments.runner import run_matrix
from ..experiments.training import Training
from .compare import add_executor, sbatch_options

FULL, MINIATURE = "Matrix/table3.yaml", "Matrix/table3_miniature.yaml"
BASELINE = "BN"
ESTIMATE = """\
Estimated from published numbers for ResNet-50 in large batches (NVIDIA's DeepLearningExamples) and
Mask R-CNN R50-C4 with FrozenBN (detectron2's model zoo). Live norms and small batches take longer,
newer GPUs less. Evaluation is not included. None of the numbers was measured with this package."""
MEASURED = """\
Estimated from the times of R50-C4's steps in {file}, without data loading, communication and
evaluation. Pretraining is not measured there: the published number for V100s is scaled by the ratio
of the measured to the published number for the detector."""
# Size of the checkpoints of a full-size training: weights and momentum in float32. The newest three
# and the final one are kept (SOLVER.CHECKPOINT_MAX_TO_KEEP).
CLASSIFIER_GB, DETECTOR_GB = 0.9, 1.2


def show_plan(
    specs: List[RunSpec], output: Path, num_gpus: int, gpu_check: Optional[Path] = None
) -> None:
    """Prints the steps, with estimated times if they run on GPUs."""
    plan = planned_trainings(specs, output, measured_rates(gpu_check) if gpu_check else None)
    unit = "GPU hours" if gpu_check else "V100 hours"
    table = Table("step", "images seen", unit, "folder", "", box=None)
    for column in (1, 2):
        table.columns[column].justify = "right"
    for step in plan:
        hours = f"{step.gpu_hours:,.0f}" if num_gpus else "–"
        done = "finished" if step.finished else ""
        folder = str(output / step.training.folder)
        table.add_row(step.training.label, f"{step.images:,}", hours, folder, done)
    table.add_row("report", "", "", str(output / "report"))
    console = Console()
    # A log or a pipe has no width; with rich's default, paths would be broken into two lines.
    console.width = max(console.width, 160)
    console.print(table)
    if num_gpus:
        left = sum(step.gpu_hours for step in plan if not step.finished)
        print(f"\nTo do: {left:,.0f} {unit}, or {left / num_gpus:,.0f} hours on {num_gpus}.")
        print(MEASURED.format(file=gpu_check) if gpu_check else ESTIMATE)
        storage = sum(
            CLASSIFIER_GB if step.training.is_pretraining else DETECTOR_GB for step in plan
        )
        print(
            f"Checkpoints: {storage:,.0f} GB in {output}. docs/reproduce.md describes the load on "
            "the network."
        )


def report(output: Path) -> List[Path]:
    """Writes a report for each data set that the finished runs were evaluated on."""
    from ..evaluation.comparison import compare
    from ..evaluation.inputs import IOU_TYPES
    from ..evaluation.markdown import markdown
    from ..evaluation.report import write_report
    from ..evaluation.runs import Run, find_runs

    by_data: Dict[Path, List[Run]] = defaultdict(list)
    for run in find_runs(output):
        if run.gt is None:
            raise UserError(f"{run.results.parent.parent}: its run.json names no ground truth")
        by_data[run.gt].append(run)
    files = []
    for gt, runs in by_data.items():
        comparison = compare(runs, gt, IOU_TYPES, BASELINE, resamples=1000, seed=0)
        files += write_report(comparison, output / "report" / gt.stem)
        # The page begins with the verdicts and the table.
        Console().print(Markdown(markdown(comparison).split("\n## ")[0]))
    return files


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--miniature", action="store_true", help=f"use the matrix {MINIATURE}")
    what.add_argument("--matrix", default=FULL, help="matrix file; default: %(default)s")
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="seeds to run; default: those of the matrix"
    )
    parser.add_argument(
        "--num-gpus", type=int, help="GPUs of each run; default: 8, or 0 in miniature"
    )
    parser.add_argument("--jobs", type=int, help="runs at a time; default: 1, or 2 in miniature")
    parser.add_argument(
        "--output",
        type=Path,
        help="output folder; default: output/table3, or output/table3_miniature",
    )
    parser.add_argument("--dry-run", action="store_true", help="list the steps and stop")
    parser.add_argument(
        "--gpu-check",
        type=Path,
        metavar="JSON",
        help="gpu_check.json of make gpu-check, from which --dry-run estimates the hours",
    )
    add_executor(parser)
    args = parser.parse_args()
    options = sbatch_options(args)

    matrix = find_config(MINIATURE if args.miniature else args.matrix)
    num_gpus = args.num_gpus if args.num_gpus is not None else 0 if args.miniature else 8
    jobs = args.jobs if args.jobs is not None else 2 if args.miniature else 1
    output = args.output or Path("output", Path(matrix).stem)
    specs = load_matrix(matrix)
    if args.seeds:
        check_seeds(args.seeds)
        specs = list(
            dict.fromkeys(dataclasses.replace(c, seed=s) for s in args.seeds for c in specs)
        )
    if args.dry_run:
        return show_plan(specs, output, num_gpus, args.gpu_check)
    check_data(specs)
    if args.executor == "slurm" and not all(Training(spec).is_finished(output) for spec in specs):
        from ..experiments.slurm import submit_matrix

        submit_matrix(specs, output, num_gpus, options)
        return print("When all jobs are done, the same command writes the report.")
    records = run_matrix(specs, output, num_gpus, jobs)
    print("\n".join(map(str, report(output))))
    failed = sum(record["status"] != "finished" for record in records)
    if failed:
        raise UserError(f"{failed} of {len(records)} runs did not finish; see above")
