"""What a matrix keeps in the folders of its runs. Needs neither PyTorch nor detectron2."""

import json
from pathlib import Path
from typing import Any, Dict, List

from ..errors import UserError
from ..io.atomic import atomic_write
from ..io.json import read_json

__all__ = [
    "BACKBONE",
    "JOB",
    "PRETRAINING",
    "RUN",
    "last_metrics",
    "read_record",
    "seed_lock",
    "seed_locks_in",
    "write_record",
]

# In the folder of a detector, in that of a pretraining, and in both if a job of SLURM does it.
RUN, PRETRAINING, JOB = "run.json", "pretraining.json", "slurm.json"
# In the folder of a pretraining that is done: what its detectors start from.
BACKBONE = "backbone.pth"

_SEED_LOCK = ".lock_seed"


def seed_lock(seed: int) -> str:
    """Name of the lock file, in the output folder, of the call that runs a seed."""
    return f"{_SEED_LOCK}{seed}"


def seed_locks_in(output: Path) -> List[str]:
    """Names of the lock files of all seeds; a file says nothing about whether a call holds it."""
    return [file.name for file in output.glob(f"{_SEED_LOCK}*")]


def read_record(file: Path) -> Dict[str, Any]:
    """Reads one of these files.

    Raises:
        UserError: If it cannot be read, or is no record.
    """
    content = read_json(file)
    if not isinstance(content, dict):
        raise UserError(f"{file}: is not a record of a run, but a {type(content).__name__}")
    return content


def write_record(path: Path, record: Dict[str, Any]) -> None:
    """Writes one of these files, whole or not at all.

    Raises:
        UserError: If it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(str(path)) as f:
            json.dump(record, f, indent=1)
    except OSError as e:
        raise UserError(f"{path} cannot be written: {e.strerror}") from None


def last_metrics(folder: Path) -> Dict[str, Any]:
    """Returns the last line of a run's metrics.json; {} without one."""
    try:
        last = json.loads((folder / "metrics.json").read_text().strip().splitlines()[-1])
        return last if isinstance(last, dict) else {}
    except (OSError, IndexError, ValueError):  # no file yet, or a partial line
        return {}
