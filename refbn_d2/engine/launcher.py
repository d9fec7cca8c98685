"""Starts the processes of a run with detectron2's launch, or joins those of torchrun or srun."""

import multiprocessing
import os
import re
import signal
import sys
from argparse import Namespace
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Callable, Dict, Iterator, List, Mapping

import torch
from detectron2.engine import launch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch import distributed as dist
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from ..errors import UserError
from ..upstream import create_local_process_group
from .signals import SIGNALS, handle, restore

__all__ = ["TIMEOUT", "check_device", "launcher_environment", "start"]

# Environment variable: seconds that a process waits for the others before it ends.
TIMEOUT = "REFBN_TIMEOUT"

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launcher_environment(env: Mapping[str, str]) -> Dict[str, str]:
    """Returns torchrun's environment variables, derived from Slurm's if srun started the process.

    Args:
        env: Environment variables of this process.

    Returns:
        The variables RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT;
        an empty dict for a process that was started alone.

    Raises:
        UserError: If one of them has an invalid value.
    """
    if all(name in env for name in _TORCHRUN):  # first: srun may have started torchrun
        return _checked({name: env[name] for name in _TORCHRUN})
    # A batch script or a shell in an allocation has SLURM_PROCID and SLURM_NTASKS, but no step of
    # several tasks.
    if env.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return {}
    world_size = _slurm(env, "STEP_NUM_TASKS")
    # node[03-05,07] -> node03; "4(x2)" -> 4
    host = re.sub(r"\[(\w+)[^]]*\]", r"\1", _slurm(env, "STEP_NODELIST", ".+")).split(",")[0]
    found = {
        "RANK": _slurm(env, "PROCID"),
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": _slurm(env, "LOCALID"),
        "LOCAL_WORLD_SIZE": _slurm(env, "STEP_TASKS_PER_NODE", r"[0-9]+.*").split("(")[0],
        "MASTER_ADDR": host,
        # Different ports for simultaneous steps, of one job or of several.
        "MASTER_PORT": str(
            20000 + (int(_slurm(env, "JOB_ID")) + int(_slurm(env, "STEP_ID"))) % 10000
        ),
    }
    return _checked({**found, **{k: env[k] for k in ("MASTER_ADDR", "MASTER_PORT") if k in env}})


def _slurm(env: Mapping[str, str], name: str, pattern: str = "[0-9]+") -> str:
    """Returns SLURM_``name``; raises a UserError if it is missing or does not match ``pattern``."""
    value = env.get(f"SLURM_{name}", "")
    if not re.fullmatch(pattern, value):
        raise UserError(
            f"SLURM_{name} is {value!r} in the environment: start with srun, which sets it, or "
            "unset SLURM_STEP_NUM_TASKS"
        )
    return value


def _checked(found: Dict[str, str]) -> Dict[str, str]:
    for name, value in found.items():
        if name != "MASTER_ADDR" and not re.fullmatch("[0-9]+", value):
            raise UserError(f"{name} is {value!r} in the environment: use a whole number")
    if int(found["MASTER_PORT"]) > 65535:
        raise UserError(f"MASTER_PORT is {found['MASTER_PORT']}: use a port from 0 to 65535")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        if int(found[name]) == 0:
            raise UserError(f"{name} is 0 in the environment: use a number from 1")
    if not found["MASTER_ADDR"]:
        raise UserError("MASTER_ADDR is '' in the environment: use the first machine's address")
    return found


def _timeout() -> timedelta:
    value = os.environ.get(TIMEOUT, "")
    if not value:
        return DEFAULT_TIMEOUT
    if not re.fullmatch("0*[1-9][0-9]{0,6}", value):
        raise UserError(f"{TIMEOUT} is {value!r} in the environment: use whole seconds from 1")
    return timedelta(seconds=int(value))


def start(main: Callable[..., Any], args: Namespace, device: str, main_args: tuple) -> None:
    """Calls ``main(*main_args)`` in each process of the run.

    Args:
        main: Function to call. If there are several processes, they form a process group.
        args: Command line, parsed by detectron2's ``default_argument_parser``.
        device: MODEL.DEVICE. On the CPU processes communicate by gloo, on GPUs by NCCL.
        main_args: Arguments of ``main``.

    Raises:
        UserError: If the launcher's environment contradicts ``args``, or if a process was killed.
    """
    env = launcher_environment(os.environ)
    if not env:
        return _launch(main, args, device, main_args)
    if args.num_gpus > 1 or args.num_machines > 1:
        raise UserError(
            f"--num-gpus {args.num_gpus} --num-machines {args.num_machines}: torchrun or srun has "
            "started the processes; leave these options out"
        )
    world_size, local_size = int(env["WORLD_SIZE"]), int(env["LOCAL_WORLD_SIZE"])
    if world_size % local_size:
        raise UserError(
            f"{world_size} processes, {local_size} on this machine: use as many on every machine"
        )
    on_gpu = device.startswith("cuda")
    if on_gpu:
        count = torch.cuda.device_count()  # 1 if srun shows each process only its own GPU
        if count == 0 or 1 < count < local_size:
            raise UserError(
                f"MODEL.DEVICE is {device}, for {local_size} processes on a machine with {count} "
                "GPUs: start fewer, or set MODEL.DEVICE cpu"
            )
        torch.cuda.set_device(int(env["LOCAL_RANK"]) % count)
    os.environ.update(env)
    try:
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=_timeout())
    # Network errors are subclasses of RuntimeError; torch 2.4 raises RuntimeError for a used port.
    except RuntimeError as e:
        network = isinstance(e, (dist.DistNetworkError, dist.DistStoreError))
        if not network and "EADDRINUSE" not in str(e):
            raise
        where = f"{env['MASTER_ADDR']}:{env['MASTER_PORT']} (MASTER_ADDR, MASTER_PORT)"
        raise UserError(
            f"the processes cannot connect to each other at {where}: {_reason(e)}"
        ) from e
    create_local_process_group(local_size)
    comm.synchronize()
    main(*main_args)
    dist.destroy_process_group()


def _reason(error: Exception) -> str:
    if "EADDRINUSE" in str(error) or "already in use" in str(error):
        return "the port is in use; choose another, or end what uses it"
    return str(error).splitlines()[0]


def check_device(device: str) -> None:
    """Raises a UserError if MODEL.DEVICE is a device that this machine does not have."""
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise UserError(f"MODEL.DEVICE is {device}, and there is no GPU: set MODEL.DEVICE cpu")
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as e:  # what PyTorch raises, by device
        raise UserError(
            f"MODEL.DEVICE is {device}, which PyTorch cannot use here: set MODEL.DEVICE cpu"
        ) from e


def _launch(main: Callable[..., Any], args: Namespace, device: str, main_args: tuple) -> None:
    options = {k: getattr(args, k) for k in ("num_machines", "machine_rank", "dist_url")}
    options["timeout"] = _timeout()
    if args.num_gpus * args.num_machines <= 1:
        check_device(device)
        return launch(main, args.num_gpus, **options, args=main_args)
    if not device.startswith("cuda"):
        raise UserError(
            f"--num-gpus {args.num_gpus} with MODEL.DEVICE {device}: start the processes with "
            f"torchrun --nproc_per_node {args.num_gpus}, without --num-gpus"
        )
    if args.num_gpus > torch.cuda.device_count():
        raise UserError(
            f"--num-gpus {args.num_gpus}: this machine has {torch.cuda.device_count()} GPUs"
        )
    with _passed_on_signals() as received:
        try:
            launch(main, args.num_gpus, **options, args=main_args)
        except ProcessExitedException as e:
            if not received and e.exit_code - 128 not in SIGNALS:
                raise UserError(f"{e} (out of memory?); start again with --resume") from e
            received.append(e.exit_code - 128)
        except ProcessRaisedException as e:
            if "EADDRINUSE" not in str(e):
                raise
            raise UserError(f"--dist-url {args.dist_url}: the port is in use") from e
    if received:
        sys.exit(128 + received[0])


@contextmanager
def _passed_on_signals() -> Iterator[List[int]]:
    """Forwards the signals that request an end to the child processes and waits for their end."""
    received: List[int] = []

    def pass_on(signum, frame):
        if signum == signal.SIGINT in received:  # the second Ctrl-C: stop at once
            raise KeyboardInterrupt
        received.append(signum)
        for child in multiprocessing.active_children():
            child.terminate()

    previous = handle(pass_on)
    try:
        yield received
    finally:
        restore(previous)
