"""Files of a matrix in the folders of its runs. Needs neither PyTorch nor detectron2."""

import json
from pathlib import Path
from typing import Any, Dict, List

from ..errors import UserError
from ..io.atomic import atomic_write, write_errors
from ..io.json import read_json

__all__ = [
    "BACKBONE",
    "JOB",
    "PRETRAINING",
    "RUN",
    "STOPPED",
    "last_metrics",
    "read_record",
    "seed_lock",
    "seed_locks_in",
    "write_record",
]

# Record of a detector's training, record of a pretraining, and id of the SLURM job of either.
RUN, PRETRAINING, JOB = "run.json", "pretraining.json", "slurm.json"
# Result of a finished pretraining: the weights from which its detectors start.
BACKBONE = "backbone.pth"
# Error in the record of a training that was told to end.
STOPPED = "stopped; the same command goes on from the last checkpoint"

_SEED_LOCK = ".lock_seed"


def seed_lock(seed: int) -> str:
    """Name of the lock file, in the output folder, of the call that runs a seed."""
    return f"{_SEED_LOCK}{seed}"


def seed_locks_in(output: Path) -> List[str]:
    """Names of the lock files of all seeds. A file remains after its lock was released."""
    return [file.name for file in output.glob(f"{_SEED_LOCK}*")]


def read_record(file: Path) -> Dict[str, Any]:
    """Reads a record.

    Args:
        file: Path of RUN, PRETRAINING or JOB.

    Raises:
        UserError: If the file cannot be read, or is not a record.
    """
    content = read_json(file)
    if not isinstance(content, dict):
        raise UserError(f"{file}: is not a record of a run, but a {type(content).__name__}")
    return content


def write_record(path: Path, record: Dict[str, Any]) -> None:
    """Writes a record atomically; creates its folder.

    Args:
        path: Path of RUN, PRETRAINING or JOB.
        record: Content of the file.

    Raises:
        UserError: If the file cannot be written.
    """
    with write_errors(path, "make it writable or choose another --output"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(str(path)) as f:
            json.dump(record, f, indent=1)


def last_metrics(folder: Path) -> Dict[str, Any]:
    """Returns the last line of a run's metrics.json, or {} if there is none."""
    try:
        last = json.loads((folder / "metrics.json").read_text().strip().splitlines()[-1])
        return last if isinstance(last, dict) else {}
    except (OSError, IndexError, ValueError):  # no file yet, or a partial line
        return {}
