#!/usr/bin/env python3
"""Draws learning curves of classifiers that differ in norm and seed, and prints their errors.

    dev/plot_classification.py output/mnist/lenet5 --output lenet5.png --accuracy 98 99

RUN is an OUTPUT_DIR of `refbn-d2 classify`, or a folder that contains several of them.
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from refbn_d2.errors import UserError, one_line_errors
from refbn_d2.evaluation.learning_curves import figure, find_classifier_runs, rows


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="the figure, .png or .svg")
    parser.add_argument(
        "--accuracy",
        type=float,
        nargs="*",
        default=[],
        help="count the steps to these, in percent; of training images as means of 100 steps",
    )
    args = parser.parse_args()
    if args.output.suffix not in (".png", ".svg") or not args.output.parent.is_dir():
        raise UserError(f"--output {args.output}: give a .png or .svg file in a folder that exists")
    groups = find_classifier_runs(args.runs)
    header, table = rows(groups, args.accuracy)
    figure(groups, args.accuracy).savefig(args.output)
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *table]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    console = Console()
    console.print(Markdown(text)) if console.is_terminal else print(text)
    print(args.output)


if __name__ == "__main__":
    main()
