"""Runs a matrix as jobs of SLURM, one for each run, with submitit. No process waits for them."""

import shlex
import shutil
import subprocess
import sys
from os import environ
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

from ..errors import UserError
from ..extras import needs_extra
from .matrix import RunSpec
from .process import run_training
from .records import JOB, read_record, write_record
from .runner import prepare, seed_locks
from .status import JOBS, is_live, job_of, scheduler
from .training import Training, trainings_of

__all__ = ["submit_matrix"]

# SLURM sends SIGTERM 120 s before the time limit. The job then saves and queues again.
_NOTICE = "B:TERM@120"


def submit_matrix(
    specs: List[RunSpec], output: Path, num_gpus: int, options: Mapping[str, Any]
) -> None:
    """Submits a job for each run that is neither finished nor submitted; returns at once.

    A job that is preempted, reaches its time limit or loses its machine queues again, and goes on
    from its last checkpoint. Detectors wait for their pretraining, a job of its own.

    Args:
        specs: Runs of the matrix.
        output: Output folder; all machines of the cluster must share it.
        num_gpus: Number of GPUs of each job; 0 for the CPU.
        options: Further options of sbatch, such as ``{"partition": "gpu"}``.

    Raises:
        UserError: If submitit or SLURM is not installed, if SLURM refuses a job, or if ``output``
            contains one of the runs with another config.
    """
    with needs_extra():
        from submitit import SlurmExecutor
        from submitit.core.utils import FailedJobError
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch is not installed: apt-get install slurm-client, or use a login node"
        )
    output = output.resolve()
    executor = SlurmExecutor(output / JOBS, python=f"exec {shlex.quote(sys.executable)}")

    def submit(training: Training, after: Optional[str]) -> str:
        executor.update_parameters(
            job_name="-".join(training.folder.parts),
            time=None,  # the default of the partition; that of submitit is 5 minutes
            use_srun=False,
            stderr_to_stdout=True,
            additional_parameters={
                "requeue": True,
                "signal": _NOTICE,
                **({"gpus-per-node": num_gpus} if num_gpus else {}),
                **({"dependency": f"afterany:{after}"} if after else {}),
                **options,
            },
        )
        try:
            job = executor.submit(_run, training, output, num_gpus).job_id
        except FailedJobError as e:
            lines = [x for x in str(e).splitlines() if x.startswith("sbatch: ")]
            raise UserError("; ".join(lines) or str(e)) from None
        write_record(output / training.folder / JOB, {"job": job})
        return job

    trainings = trainings_of(specs)
    with seed_locks(specs, output):
        jobs = _live_jobs(trainings, output)
        todo = [t for t in trainings if t.folder not in jobs]
        prepare(todo, output)
        unfinished = [t for t in todo if not t.is_finished(output)]
        for training in unfinished:
            before = training.pretraining
            jobs[training.folder] = submit(training, jobs.get(before.folder) if before else None)
    print(
        f"{len(specs)} runs: {_runs(todo) - _runs(unfinished)} finished, "
        f"{len(specs) - _runs(todo)} submitted before, {_runs(unfinished)} submitted now\n"
        f"refbn-d2 compare status {shlex.quote(str(output))}"
    )


def _runs(trainings: List[Training]) -> int:
    return sum(not training.is_pretraining for training in trainings)


def _live_jobs(trainings: List[Training], output: Path) -> Dict[Path, str]:
    """Returns the folders of the trainings whose job waits or runs, with the id of the job."""
    jobs = {t.folder: job for t in trainings if (job := job_of(output / t.folder))}
    found = scheduler(jobs.values())
    return {folder: job for folder, job in jobs.items() if is_live(found.get(job))}


def _run(training: Training, output: Path, num_gpus: int) -> None:
    """Function of a job: runs one training.

    Raises:
        SystemExit: If it did not finish.
    """
    folder = output / training.folder
    before = _last_checkpoint(folder)
    status = run_training(training, output, num_gpus)["status"]
    if status == "interrupted":
        _queue_again(output / training.record_file, before != _last_checkpoint(folder))
    if status != "finished":
        sys.exit(1)


def _last_checkpoint(folder: Path) -> str:
    file = folder / "last_checkpoint"
    return file.read_text() if file.exists() else ""


def _queue_again(record: Path, has_moved: bool) -> None:
    """Queues this job again if the signal was the notice of its time limit.

    The job's state is then still RUNNING. After a preemption or cancellation it is another one: a
    preempted job is queued again by SLURM, and a cancelled one must not be.

    Args:
        record: Path of the record of the training.
        has_moved: Whether the job has written a checkpoint.
    """
    job = environ["SLURM_JOB_ID"]
    state = scheduler([job]).get(job)
    if state is None or state.name != "RUNNING":
        return
    if has_moved:
        subprocess.run(["scontrol", "requeue", job], check=True)
    else:  # queued again, it would never get further
        error = "stopped before its first checkpoint; set --slurm time=... higher"
        write_record(record, {**read_record(record), "error": error})
