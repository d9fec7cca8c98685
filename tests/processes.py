"""Processes that start quickly, because they are forked from a server, and process groups."""

import tempfile
from datetime import timedelta
from typing import Callable

import torch
from torch import distributed as dist
from torch import multiprocessing as mp


def start(target: Callable[..., None], *args: object) -> mp.Process:
    """A process that runs ``target(*args)``."""
    _prepare_server()
    process = mp.get_context("forkserver").Process(target=target, args=args)
    process.start()
    return process


def run_group(world_size: int, check: Callable[..., None], *args: object) -> None:
    """Runs ``check(rank, world_size, *args)`` in a gloo group; a hang ends with gloo's timeout.

    Raises:
        ProcessRaisedException: with the traceback, if one of them fails.
    """
    _prepare_server()
    with tempfile.TemporaryDirectory() as folder:
        arguments = world_size, folder, check, args
        mp.start_processes(_in_group, arguments, world_size, start_method="forkserver")


def _prepare_server() -> None:
    # Torch and detectron2 take seconds to import. The first list counts, hence one for all tests.
    mp.set_forkserver_preload(["kills", "torch.utils.tensorboard", "pygments.lexers", "pytest"])


def _in_group(rank: int, world_size: int, folder: str, check: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=120),
    )
    try:
        check(rank, world_size, *args)
    finally:
        dist.destroy_process_group()
