"""Progress of the runs of a matrix, from their folders and from SLURM."""

import os
import re
import shutil
import signal
import socket
import subprocess
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Collection, Dict, List, NamedTuple, Optional

from ..errors import UserError
from ..io.coco import is_number
from ..io.lock import holder
from .records import (
    BACKBONE,
    JOB,
    PRETRAINING,
    RUN,
    last_metrics,
    read_record,
    seed_lock,
    seed_locks_in,
)

__all__ = ["JOBS", "Stage", "cancel", "find_stages", "is_live", "job_of", "scheduler", "summary"]

# In the output folder: scripts and logs of the jobs.
JOBS = "slurm"

_ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"}
_ENDED |= {"OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"}

# Pattern in the log of a job that SLURM killed, or in its last state -> explanation.
_KILLED = {
    r"oom[-_ ]kill|OOM Killed|exceeded (job )?memory limit|OUT_OF_MEMORY": (
        "killed by SLURM for its memory use; set --slurm mem=... higher"
    ),
    r"DUE TO TIME LIMIT|TIMEOUT": (
        "killed by SLURM at its time limit; the same command goes on from the last checkpoint"
    ),
    r"DUE TO NODE FAILURE|NODE_FAIL": "its machine failed; the same command goes on",
    r"CANCELLED": "cancelled; the same command goes on",
}


_STATUSES = ("done", "running", "queued", "stopped", "failed")


class JobState(NamedTuple):
    """State of a job in SLURM: its name, such as RUNNING, and the reason why the job waits."""

    name: str
    reason: str


@dataclass(frozen=True)
class Stage:
    """A training of a matrix: of a detector, or a pretraining.

    Attributes:
        folder: Folder of the training, relative to the output folder.
        status: "done", "running", "queued", "stopped" or "failed".
        detail: Reason why it failed or waits, or its current iteration.
        seconds: Time of all its attempts in seconds; 0 if unknown.
        left: Remaining time in seconds; None if unknown.
        job: Id of its job in SLURM, or None.
    """

    folder: Path
    status: str
    detail: str = ""
    seconds: float = 0.0
    left: Optional[float] = None
    job: Optional[str] = None


def job_of(folder: Path) -> Optional[str]:
    """Id of the last job that was submitted for a run's folder, or None."""
    file = folder / JOB
    return str(read_record(file).get("job")) if file.exists() else None


def scheduler(jobs: Collection[str]) -> Dict[str, JobState]:
    """Gets the states of jobs from SLURM, which only knows jobs that ended in the last minutes.

    Args:
        jobs: Ids of the jobs.

    Raises:
        UserError: If SLURM does not answer.
    """
    if not jobs:
        return {}
    if shutil.which("squeue") is None:
        raise UserError("squeue is not installed, and the runs are SLURM jobs: use a login node")
    command = ["squeue", "--noheader", "--states=all", "--format=%i|%T|%r"]
    done = subprocess.run(
        [*command, f"--jobs={','.join(jobs)}"], capture_output=True, text=True, check=False
    )
    if done.returncode and "Invalid job id" not in done.stderr:
        raise UserError(f"squeue: {done.stderr.strip()}")
    rows = [line.split("|") for line in done.stdout.splitlines()]
    return {job: JobState(name, reason) for job, name, reason in rows}


def is_live(state: Optional[JobState]) -> bool:
    """Whether a job waits or runs."""
    return state is not None and state.name not in _ENDED


def find_stages(output: Path) -> List[Stage]:
    """Finds the trainings of a matrix and their progress, pretrainings first.

    Args:
        output: Output folder of ``compare run``.

    Raises:
        UserError: If there is no run in it, a record is damaged, or SLURM does not answer.
    """
    if not output.is_dir():
        raise UserError(f"{output}: no such folder")
    files = [*sorted(output.rglob(PRETRAINING)), *sorted(output.rglob(RUN))]
    if not files:
        raise UserError(f"{output}: no run was begun in it")
    records = {file: read_record(file) for file in files}
    open_jobs = {
        file: job
        for file, record in records.items()
        if record.get("status") != "finished" and (job := job_of(file.parent))
    }
    states = scheduler(open_jobs.values())
    found = []
    for file, record in records.items():
        job = open_jobs.get(file)
        seeds = [str(seed_lock(record["seed"]))] if "seed" in record else []
        locks = seeds or seed_locks_in(output)
        is_local = job is None and any(holder(output, lock) for lock in locks)
        found.append(_stage(output, file.parent, record, job, states.get(job or ""), is_local))
    return found


def _stage(
    output: Path,
    folder: Path,
    record: Dict[str, Any],
    job: Optional[str],
    state: Optional[JobState],
    is_local: bool,
) -> Stage:
    """Determines the progress of one training.

    Args:
        output: Output folder of the matrix.
        folder: Folder of the training.
        record: Record of the training.
        job: Id of its job in SLURM, or None.
        state: State of the job, or None.
        is_local: Whether a ``compare run`` of this training is running.
    """
    recorded: Any = record.get("seconds")
    seconds = float(recorded) if is_number(recorded) else 0.0
    status, error = record.get("status"), str(record.get("error", ""))
    left: Optional[float] = None
    if status == "finished" or (folder / BACKBONE).exists():
        status, error = "done", ""
    elif is_live(state) or (is_local and status in ("queued", "running")):
        if state and state.name == "PENDING":
            status, error = "queued", state.reason
        elif state or status == "running":
            status = "running"
            metrics = last_metrics(folder)
            eta: Any = metrics.get("eta_seconds")
            left = float(eta) if is_number(eta) else None
            error = f"iteration {metrics.get('iteration', 0)} of {record.get('iterations', '?')}"
    elif job:
        log = output / JOBS / f"{job}_0_log.out"
        status = "stopped" if status == "interrupted" else "failed"
        error = _end_of(log, state, error)
    elif status == "queued":
        status = "stopped"
    elif status in ("running", "interrupted"):
        status, error = "stopped", error or "ended unexpectedly; the same command goes on"
    return Stage(folder.relative_to(output), str(status), error, seconds, left, job)


def _end_of(log: Path, state: Optional[JobState], error: str) -> str:
    """Describes in one line why a job has ended.

    Args:
        log: Path of the file with the output of the job.
        state: Last state of the job; None if SLURM no longer knows it.
        error: Error in the record of its run; "" if there is none.
    """
    if error and "SIGKILL" not in error:
        return error
    if not log.exists():
        return f"no output in {log}: do all machines of the cluster share this folder?"
    text = log.read_text(errors="replace")
    text = text[max(0, text.rfind("Starting with JobEnvironment")) :]  # only its last attempt
    for pattern, words in _KILLED.items():
        if re.search(pattern, f"{state.name if state else ''}\n{text}"):
            return words
    return error or f"{text.strip().splitlines()[-1]} (see {log})"


def summary(stages: List[Stage]) -> str:
    """Describes all trainings: one line with their numbers and the time left, then one for each."""
    numbers = {s: sum(x.status == s for x in stages) for s in _STATUSES}
    first = f"{len(stages)} trainings: " + ", ".join(
        f"{n} {s}" for s, n in numbers.items() if n or s != "stopped"
    )
    left = _seconds_left(stages)
    if left is not None:
        first += f"; about {timedelta(seconds=round(left))} (h:mm:ss) left"
    width = max(len(str(x.folder)) for x in stages)
    lines = [first]
    for x in stages:
        detail = [x.detail] if x.detail else []
        if x.status in ("done", "running") and x.seconds:
            detail.append(f"took {timedelta(seconds=round(x.seconds))}")
        if x.left is not None:
            detail.append(f"{timedelta(seconds=round(x.left))} left")
        if x.job:
            detail.append(f"job {x.job}")
        lines.append(f"{x.status:<8} {str(x.folder):<{width}}  {', '.join(detail)}".rstrip())
    return "\n".join(lines)


def _seconds_left(stages: List[Stage]) -> Optional[float]:
    """Estimates the seconds until all trainings have ended; None if that is not possible.

    It is assumed that always as many trainings run as at present.
    """
    running = [x for x in stages if x.status == "running"]
    waiting = sum(x.status == "queued" for x in stages)
    times = [x.seconds for x in stages if x.status == "done" and x.seconds]
    if not running or any(x.left is None for x in running) or (waiting and not times):
        return None
    total = sum(x.left or 0.0 for x in running)
    total += waiting * sum(times) / len(times) if waiting else 0.0
    return total / len(running)


def cancel(output: Path) -> List[str]:
    """Stops the running and waiting trainings: SLURM jobs, and ``compare run`` on this machine.

    Trainings save a checkpoint before they end.

    Args:
        output: Output folder of ``compare run``.

    Returns:
        A line for each job and each process that is stopped.

    Raises:
        UserError: If SLURM reports an error, or if ``compare run`` is running on another machine.
    """
    stages = find_stages(output)
    jobs = [x.job for x in stages if x.job and x.status in ("queued", "running")]
    if jobs:
        done = subprocess.run(["scancel", *jobs], capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(done.stderr.strip())
    lines = [f"job {job}" for job in jobs]
    owners = {holder(output, name) for name in seed_locks_in(output)} - {None}
    for owner in sorted(map(str, owners)):
        match = re.fullmatch(r"process (\d+) on (.*)", owner)
        if not match or match[2] != socket.gethostname():
            raise UserError(f"{output} is in use by {owner}: end it there")
        os.kill(int(match[1]), signal.SIGTERM)
        lines.append(owner)
    return lines
