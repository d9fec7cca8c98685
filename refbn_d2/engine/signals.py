"""On SIGTERM, SIGINT or SIGHUP: finish the step, save, exit with 128 + signal."""

import logging
import os
import signal
import threading
import time
from types import FrameType
from typing import Any, Callable, Dict, Optional

from detectron2.engine import HookBase
from detectron2.utils import comm

from .checkpoint import Checkpointer

__all__ = ["PARENT", "SIGNALS", "StopOnSignal", "end_with_parent", "handle", "restore"]

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

# Environment variable: the process whose end is to end the one that it has started.
PARENT = "REFBN_PARENT"


def handle(handler: Callable[[int, Optional[FrameType]], None]) -> Dict[int, Any]:
    """Makes ``handler`` that of SIGNALS, but for SIGHUP under nohup.

    Returns:
        The handlers before, for :func:`restore`; none where Python allows none, in other threads.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    signals = [s for s in SIGNALS if not (s == signal.SIGHUP and ignored)]
    return {s: signal.signal(s, handler) for s in signals}


def restore(previous: Dict[int, Any]) -> None:
    """Gives the signals the handlers that they had before :func:`handle`."""
    for signum, handler in previous.items():
        signal.signal(signum, handler)


def end_with_parent() -> None:
    """Sends this process SIGTERM when the one that PARENT names, if any, has ended.

    However that has ended: a process that is killed cannot end those that it has started.
    """
    parent = os.environ.pop(PARENT, None)
    if parent is None:
        return

    def watch():
        while os.getppid() == int(parent):
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


class StopOnSignal(HookBase):
    """Ends training after the step in which one of SIGNALS comes, with a checkpoint.

    One process that gets the signal stops all of them, after the same step. The exit status is what
    shells and schedulers know such an end by, 128 + the signal's number: 143 for SIGTERM, 130 for
    SIGINT, 129 for SIGHUP. A second SIGINT ends the process at once, and so does any signal once
    the last step is done.

    To be the last hook of a step: its checkpoint is of a step that has been evaluated and logged.

    Args:
        checkpointer: writes on the main process.
    """

    def __init__(self, checkpointer: Checkpointer):
        self.checkpointer = checkpointer
        self._received = 0
        self._previous: Dict[int, Any] = {}

    def before_train(self):
        self._pid = os.getpid()
        self._previous = handle(self._notice)

    def _notice(self, signum: int, frame: Optional[FrameType]) -> None:
        if os.getpid() != self._pid:
            return  # a worker of the data loader: this step, and only its owner ends it, needs it
        if signum == self._received == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = self._received or signum

    def after_step(self):
        iteration = self.trainer.iter
        last = iteration + 1 >= self.trainer.max_iter
        if last:
            self._restore()  # nothing is lost any more: the evaluation can be repeated
        signum = max(comm.all_gather(self._received))
        if not signum:
            return
        name = f"model_{iteration:07d}"
        if not last and comm.is_main_process():
            if os.path.basename(self.checkpointer.get_checkpoint_file()) != f"{name}.pth":
                self.checkpointer.save(name, iteration=iteration)
        comm.synchronize()  # or the first process to leave would have the others killed
        logger.warning(
            "%s: stopped after iteration %d; --resume goes on from %s",
            signal.Signals(signum).name,
            iteration,
            self.checkpointer.get_checkpoint_file(),
        )
        raise SystemExit(128 + signum)

    def after_train(self):
        self._restore()

    def _restore(self) -> None:
        restore(self._previous)
        self._previous = {}
