"""What the process of one training does, whether the runner or SLURM has started it."""

import ctypes
import multiprocessing
import os
import signal
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any, Dict, Optional

import torch
from detectron2.engine import default_argument_parser

from ..classification import ClassificationTrainer
from ..engine import Trainer
from ..engine.command import train
from ..engine.signals import end_with_parent, handle
from ..errors import UserError, user_message
from ..io.lock import folder_lock
from ..weights.convert import convert
from .records import BACKBONE, STOPPED, read_record, write_record
from .training import Training

__all__ = ["run_training"]


def run_training(training: Training, output: Path, num_gpus: int, jobs: int = 1) -> Dict[str, Any]:
    """Runs a training in this process and records how it ended.

    The process should end afterwards: its output goes to console.txt in the folder of the training,
    and it ignores the signals that ask it to end.

    Args:
        training: Training, recorded as queued.
        output: Output folder of the matrix.
        num_gpus: Number of its GPUs; 0 for the CPU.
        jobs: Number of trainings that share the CPU cores.

    Returns:
        Its record, with the status "finished", "failed" or "interrupted".
    """
    file, log = output / training.record_file, output / training.folder / "console.txt"
    with open(log, "a") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    record = read_record(file)
    record.pop("error", None)  # of an earlier attempt
    begin = time.monotonic() - record["seconds"]  # of earlier attempts
    write_record(file, {**record, "status": "running"})
    try:
        handle(_stopped)
        end_with_parent()
        # A process of an earlier, killed call may still be writing its checkpoint.
        with folder_lock(log.parent, wait=True):
            pass
        _share_cpu(jobs)
        _train(training, output, num_gpus)
        record["status"] = "finished"
    except (KeyboardInterrupt, SystemExit):
        record.update(status="interrupted", error=STOPPED)
    except Exception as e:
        error = user_message(e)
        if error is None:
            traceback.print_exc()
            line = traceback.format_exception_only(e)[-1].strip().splitlines()[-1]
            error = f"{line} (see {log})"
        print(f"error: {error}")
        record.update(status="failed", error=error)
    handle(signal.SIG_IGN)  # the record must be written
    record["seconds"] = round(time.monotonic() - begin, 1)
    write_record(file, record)
    return record


def _train(training: Training, output: Path, num_gpus: int) -> None:
    folder, opts = output / training.folder, training.opts()
    start = training.pretraining
    if start:
        if not start.is_finished(output):
            error = read_record(output / start.record_file).get("error", "did not finish")
            raise UserError(f"pretraining failed: {error}")
        opts += ["MODEL.WEIGHTS", str(output / start.folder / BACKBONE)]
    device = [] if num_gpus else ["MODEL.DEVICE", "cpu"]
    options = ["--config-file", training.config, "--num-gpus", str(num_gpus), "--resume"]
    args = [*options, "OUTPUT_DIR", str(folder), *device, *opts]
    trainer_class = ClassificationTrainer if training.is_pretraining else Trainer
    train(trainer_class, default_argument_parser().parse_args(args))
    if training.is_pretraining:
        convert(str(folder / "model_final.pth"), str(folder / BACKBONE))


def _share_cpu(jobs: int) -> None:
    """Gives this process its share of the cores, and makes it keep its memory."""
    # A job of SLURM may have fewer cores than its machine.
    cores = int(os.environ.get("SLURM_CPUS_ON_NODE") or os.cpu_count() or 1)
    torch.set_num_threads(max(1, cores // jobs))
    # A process of multiprocessing would start the workers of data loaders in its own, slower way.
    multiprocessing.set_start_method("fork", force=True)
    # By default glibc returns the memory of large tensors to the system, which then clears it again
    # in every step. On a CPU that takes a tenth of the time. 32 MB is the largest threshold of
    # glibc (M_MMAP_THRESHOLD, -3); -1 as the threshold of trimming (M_TRIM_THRESHOLD, -1) is never.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 32 << 20)
        mallopt(-1, -1)


def _stopped(signum: int, frame: Optional[FrameType]) -> None:
    handle(signal.SIG_IGN)  # the same signal may come from a terminal and from the parent process
    if signum == signal.SIGINT:
        raise KeyboardInterrupt  # the workers of a data loader, which inherit this, expect it
    raise SystemExit(128 + signum)
