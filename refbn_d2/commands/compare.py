"""Trains detectors that differ in their norm, and reports whether their AP differs.

run      trains the runs of a matrix file: norms x seeds x images per batch x grouping
status   lists the runs: done, running, queued, stopped or failed, and the time left
cancel   stops the runs after they have saved a checkpoint
report   writes report.json, report.md and report.html from run folders or COCO results files
"""

import argparse
from pathlib import Path
from typing import Any, Dict, List, Mapping

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..config_files import find_config
from ..errors import UserError, one_line_errors
from ..evaluation.inputs import IOU_TYPES
from ..evaluation.interval import MARGIN
from ..evaluation.printable import printable

MOST_SEEDS = 12  # runs per norm of --until-decided


def add_run(commands) -> None:
    parser = commands.add_parser("run", help="train and evaluate the runs of a matrix file")
    parser.add_argument(
        "matrix", help="YAML file, or Matrix/quickstart.yaml and others that come with the package"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the run folders")
    parser.add_argument("--num-gpus", type=int, default=0, help="GPUs of each run; 0 for the CPU")
    parser.add_argument(
        "--jobs",
        type=int,
        help="simultaneous runs, which share the CPU cores but no GPUs; default 1",
    )
    add_executor(parser)
    parser.add_argument(
        "--until-decided",
        action="store_true",
        help="add seeds while a comparison is undecided, at interim looks fixed beforehand",
    )
    parser.add_argument(
        "--max-seeds",
        type=int,
        help=f"with --until-decided: maximum runs per norm; default {MOST_SEEDS}",
    )
    parser.add_argument(
        "--margin",
        type=float,
        help="with --until-decided: differences of AP within +-MARGIN count as practically zero; "
        f"default {MARGIN:g}",
    )
    parser.add_argument(
        "--baseline",
        metavar="NAME",
        help="with --until-decided: norm to compare with; default: first",
    )
    parser.set_defaults(function=run)


def add_executor(parser: argparse.ArgumentParser) -> None:
    """Adds the options for the place where runs are trained."""
    parser.add_argument(
        "--executor",
        choices=("local", "slurm"),
        default="local",
        help="train on this machine, or each run as a job of SLURM; default: %(default)s",
    )
    parser.add_argument(
        "--slurm",
        nargs="+",
        default=[],
        metavar="OPTION[=VALUE]",
        help="options of sbatch, such as partition=gpu time=8:00:00 account=vision mem=64G",
    )


def sbatch_options(args: argparse.Namespace) -> Mapping[str, Any]:
    """Returns the options of sbatch in ``--slurm``.

    Raises:
        UserError: if ``--slurm`` is given for local runs, or ``--jobs`` for SLURM.
    """
    if args.executor == "local" and args.slurm:
        raise UserError("--slurm is only for jobs of SLURM: add --executor slurm")
    if args.executor == "slurm" and args.jobs is not None:
        raise UserError("--jobs is for --executor local: SLURM decides how many run at a time")
    pairs = (option.lstrip("-").partition("=") for option in args.slurm)
    return {name: value if equals else True for name, equals, value in pairs}


def run(args: argparse.Namespace) -> None:
    from ..evaluation.sequential import Plan
    from ..experiments.matrix import RunSpec, load_matrix
    from ..experiments.runner import run_matrix
    from ..experiments.until_decided import run_until_decided

    options = sbatch_options(args)
    jobs = 1 if args.jobs is None else args.jobs
    if jobs < 1:
        raise UserError(f"--jobs {jobs}: use at least 1")
    for name in () if args.until_decided else ("max_seeds", "margin", "baseline"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} belongs to --until-decided: give both")
    specs = load_matrix(find_config(args.matrix))
    if args.executor == "slurm":
        from ..experiments.slurm import submit_matrix

        if args.until_decided:
            raise UserError(
                "--until-decided has to wait for its runs, but --executor slurm does not wait: "
                "submit this command itself with sbatch, with --executor local"
            )
        return submit_matrix(specs, args.output, args.num_gpus, options)

    def train(specs: List[RunSpec]) -> List[Dict[str, Any]]:
        return run_matrix(specs, args.output, args.num_gpus, jobs)

    if args.until_decided:
        plan = Plan(
            MOST_SEEDS if args.max_seeds is None else args.max_seeds,
            MARGIN if args.margin is None else args.margin,
        )
        run_until_decided(specs, args.output, plan, args.baseline, train, jobs)
        return
    records = train(specs)
    failed = sum(record["status"] != "finished" for record in records)
    if failed:
        raise UserError(f"{failed} of {len(records)} runs did not finish; see above")


def add_status(commands) -> None:
    parser = commands.add_parser("status", help="show the progress of the runs and the time left")
    parser.add_argument("output", type=Path, help="the --output of run")
    parser.set_defaults(function=status)


def status(args: argparse.Namespace) -> None:
    from ..experiments.status import find_stages, summary

    print("\n".join(map(printable, summary(find_stages(args.output)).splitlines())))


def add_cancel(commands) -> None:
    parser = commands.add_parser("cancel", help="stop the runs; they save a checkpoint first")
    parser.add_argument("output", type=Path, help="the --output of run")
    parser.set_defaults(function=cancel)


def cancel(args: argparse.Namespace) -> None:
    from ..experiments.status import cancel

    lines = cancel(args.output)
    print("\n".join(f"stopping: {line}" for line in lines) or "no run to stop")


def add_report(commands) -> None:
    parser = commands.add_parser("report", help="AP tables, differences and intervals")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--results",
        nargs="+",
        metavar="NAME=A.json[,B.json]",
        help="COCO results of each norm, with one file per seed",
    )
    source.add_argument("--runs", type=Path, help="folder that contains run folders at any depth")
    parser.add_argument(
        "--gt", type=Path, help="COCO ground truth; default: the one that the run folders name"
    )
    parser.add_argument("--iou-type", nargs="+", choices=IOU_TYPES, default=list(IOU_TYPES))
    parser.add_argument("--baseline", metavar="NAME", help="norm to compare with; default: first")
    parser.add_argument(
        "--primary",
        choices=IOU_TYPES,
        help="IoU type whose AP decides; default: bbox if it is evaluated",
    )
    parser.add_argument(
        "--margin",
        type=float,
        default=MARGIN,
        help="differences of AP within +-MARGIN count as practically zero; default: %(default)s",
    )
    parser.add_argument(
        "--cluster",
        metavar="FIELD",
        help="field of the COCO images with their cluster, such as group or video; clusters are "
        "resampled as a whole",
    )
    parser.add_argument(
        "--resamples", type=int, default=1000, help="number of resamples of the images"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the resamples")
    parser.add_argument(
        "--images", type=Path, help="folder of the images, to show some of them in the report"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the report")
    parser.set_defaults(function=report)


def report(args: argparse.Namespace) -> None:
    from ..evaluation.comparison import compare
    from ..evaluation.markdown import markdown
    from ..evaluation.report import check_output, write_report
    from ..evaluation.runs import common_ground_truth, find_runs, named_results

    check_output(args.output)
    if args.images and not args.images.is_dir():
        raise UserError(f"--images {args.images}: no such folder")
    if args.results and not args.gt:
        raise UserError("--results needs --gt, the ground truth of the evaluated data set")
    runs = named_results(args.results) if args.results else find_runs(args.runs)
    gt = args.gt or common_ground_truth(runs)
    iou_types = [t for t in IOU_TYPES if t in args.iou_type]
    total = sum(not run.error for run in runs)
    console = Console(stderr=True)
    fields = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()
    # In a log file the progress bar would only write blank lines.
    quiet = not console.is_terminal
    with Progress(
        *fields, TimeRemainingColumn(), console=console, transient=True, disable=quiet
    ) as progress:
        task = progress.add_task("reading", total=total)

        def advance(what: str) -> None:
            progress.update(task, description=printable(what), advance=1)

        comparison = compare(
            runs,
            gt,
            iou_types,
            args.baseline,
            args.resamples,
            args.seed,
            advance,
            primary=args.primary,
            margin=args.margin,
            cluster=args.cluster,
        )
        progress.update(task, description="writing")
        files = write_report(comparison, args.output, args.images)
    # The page begins with the verdicts and the table.
    Console().print(Markdown(markdown(comparison).split("\n## ")[0]))
    print("\n".join(printable(str(file)) for file in files))


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    add_run(commands)
    add_status(commands)
    add_cancel(commands)
    add_report(commands)
    args = parser.parse_args()
    args.function(args)
