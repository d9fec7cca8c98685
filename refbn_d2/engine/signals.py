"""On SIGTERM, SIGINT or SIGHUP: finish the step, save, exit with 128 + signal."""

import multiprocessing
import os
import signal
import threading
from types import FrameType
from typing import Any, Callable, Dict, Optional, Union

from detectron2.engine import HookBase
from detectron2.utils import comm

from ..log import get_logger
from .checkpoint import Checkpointer

__all__ = ["SIGNALS", "StopOnSignal", "end_with_parent", "handle", "restore"]

logger = get_logger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def handle(
    handler: Union[Callable[[int, Optional[FrameType]], None], signal.Handlers],
) -> Dict[int, Any]:
    """Installs ``handler`` for SIGNALS, except for SIGHUP if it is ignored (nohup).

    Returns:
        The previous handlers, for :func:`restore`. Empty in threads other than the main one, where
        Python does not allow handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    signals = [s for s in SIGNALS if not (s == signal.SIGHUP and ignored)]
    return {s: signal.signal(s, handler) for s in signals}


def restore(previous: Dict[int, Any]) -> None:
    """Restores the handlers that were installed before :func:`handle`."""
    for signum, handler in previous.items():
        signal.signal(signum, handler)


def end_with_parent() -> None:
    """Sends SIGTERM to this process of ``multiprocessing`` when the one that started it has ended.

    This also works if that process was killed and could not end this one itself. Other processes
    are left alone.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch():
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


class StopOnSignal(HookBase):
    """On SIGTERM, SIGINT or SIGHUP: finishes the step, saves, and exits with 128 + signal.

    If one process gets the signal, all processes stop after the same step. The exit status follows
    the convention of shells and schedulers: 143 for SIGTERM, 130 for SIGINT, 129 for SIGHUP. A
    second SIGINT ends the process at once, and so does any signal after the last step.

    This must be the last hook, so that the step of its checkpoint has been evaluated and logged.

    Args:
        checkpointer: Checkpointer, which writes on the main process only.
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
            return  # a worker of the data loader, which this step needs; its parent ends it
        if signum == self._received == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = self._received or signum

    def after_step(self):
        iteration = self.trainer.iter
        last = iteration + 1 >= self.trainer.max_iter
        if last:
            self._restore()  # stopping now loses no step: only the evaluation would be repeated
        signum = max(comm.all_gather(self._received))
        if not signum:
            return
        name = f"model_{iteration:07d}"
        if not last and comm.is_main_process():
            if os.path.basename(self.checkpointer.get_checkpoint_file()) != f"{name}.pth":
                self.checkpointer.save(name, iteration=iteration)
        comm.synchronize()  # otherwise the launcher kills the others when the first process exits
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
