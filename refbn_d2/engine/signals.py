"""Stopping training on a notice: the step is finished, a checkpoint written, the status says so."""

import logging
import os
import signal
import threading
from types import FrameType
from typing import Any, Dict, Optional

from detectron2.engine import HookBase
from detectron2.utils import comm

from .checkpoint import Checkpointer

__all__ = ["SIGNALS", "StopOnSignal"]

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopOnSignal(HookBase):
    """Ends training after the step in which SIGTERM or SIGINT comes, with a checkpoint.

    One process that gets the signal stops all of them, after the same step. The exit status is what
    shells and schedulers know such an end by, 128 + the signal's number: 143 for SIGTERM, 130 for
    SIGINT. A second SIGINT ends the process at once, and so does any once the last step is done.

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
        if threading.current_thread() is threading.main_thread():  # Python allows no other
            self._previous = {s: signal.signal(s, self._notice) for s in SIGNALS}

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
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}
