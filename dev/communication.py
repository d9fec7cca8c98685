#!/usr/bin/env python3
"""Prints what a norm adds to the communication of a training step, as a table.

torchrun --nproc_per_node 2 dev/communication.py --config-file FILE MODEL.DEVICE cpu
"""

import argparse
import logging
import tempfile

from detectron2.utils import comm
from rich.console import Console
from rich.table import Table

from refbn_d2.benchmarks.communication import communication
from refbn_d2.config import load_config
from refbn_d2.engine.launcher import start
from refbn_d2.errors import one_line_errors

NORMS = ("BN", "RefBN", "SyncRefBN")


def _measure(config_file: str, opts: list) -> None:
    logging.disable(logging.WARNING)
    rows = []
    for norm in NORMS:
        with tempfile.TemporaryDirectory() as folder:
            options = ["MODEL.RESNETS.NORM", norm, "OUTPUT_DIR", folder]
            rows.append(communication(load_config(config_file, [*opts, *options])))
    if not comm.is_main_process():
        return
    table = Table("norm", "collective operations", "elements of this process")
    for norm, found in zip(NORMS, rows):
        elements = found.pop("elements")
        table.add_row(norm, ", ".join(f"{n} {k}" for k, n in found.items()), f"{elements:,}")
    Console().print(table)


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-file", required=True)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE ...")
    args = parser.parse_args()
    args.num_gpus = args.num_machines = 1
    device = load_config(args.config_file, args.opts).MODEL.DEVICE
    start(_measure, args, device, (args.config_file, args.opts))


if __name__ == "__main__":
    main()
