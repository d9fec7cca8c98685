"""Signals to end: the step is finished, a checkpoint is saved, the exit status is that signal's."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import kills
import processes
import pytest

from refbn_d2.engine.signals import SIGNALS, StopOnSignal, end_with_parent, handle, restore


class _Checkpointer:
    def __init__(self, last=""):
        self.last, self.saved = last, []

    def get_checkpoint_file(self):
        return self.last

    def save(self, name, iteration):
        self.saved.append((name, iteration))


class _Trainer:
    start_iter, iter, max_iter = 0, 5, 10


@pytest.fixture
def interruptible():
    """A process that a shell started in the background ignores SIGINT, and so would the tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def hook(interruptible):
    before = [signal.getsignal(s) for s in SIGNALS]
    assert len(SIGNALS) == 3
    hook = StopOnSignal(_Checkpointer())
    hook.trainer = _Trainer()
    hook.before_train()
    yield hook
    hook.after_train()
    assert [signal.getsignal(s) for s in SIGNALS] == before


def _send(signum):
    os.kill(os.getpid(), signum)


@pytest.mark.parametrize(
    "signum, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_the_step_ends_with_a_checkpoint_and_the_status_of_the_signal(hook, signum, status):
    hook.after_step()
    _send(signum)
    _send(signal.SIGTERM)  # once to the process, once to its group
    with pytest.raises(SystemExit) as e:
        hook.after_step()
    assert e.value.code == status and hook.checkpointer.saved == [("model_0000005", 5)]


def test_a_checkpoint_of_the_same_step_is_not_written_twice(hook):
    hook.checkpointer.last = "output/model_0000005.pth"
    _send(signal.SIGTERM)
    with pytest.raises(SystemExit):
        hook.after_step()
    assert not hook.checkpointer.saved


def test_a_second_interrupt_ends_it_at_once(hook):
    _send(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        _send(signal.SIGINT)


def test_after_the_last_step_any_signal_ends_it_at_once(hook):
    """What is left is the evaluation, which can be repeated."""
    hook.trainer.iter = 9
    hook.after_step()
    with pytest.raises(KeyboardInterrupt):
        _send(signal.SIGINT)
    assert not hook.checkpointer.saved


def test_a_signal_in_the_last_step_skips_the_evaluation(hook):
    hook.trainer.iter = 9
    _send(signal.SIGTERM)
    with pytest.raises(SystemExit) as e:
        hook.after_step()
    assert e.value.code == 143 and not hook.checkpointer.saved


def test_a_run_that_was_told_to_end_goes_on_exactly(tiny_data, tmp_path):
    """The scheduler tells all processes, those that load images, too."""
    whole, output = tmp_path / "whole", tmp_path / "stopped"
    kills.finish(tiny_data, whole, False)
    process = kills.start(tiny_data, output, False, DATALOADER__NUM_WORKERS=2)
    kills.wait_for(output / "last_checkpoint", process)
    os.killpg(process.pid, signal.SIGTERM)
    process.join()
    log = (output / "output.txt").read_text()
    assert process.exitcode == 143 and "Traceback" not in log
    last = (output / "last_checkpoint").read_text()
    assert f"--resume goes on from {output / last}" in log and last != "model_final.pth"
    kills.finish(tiny_data, output, True)
    kills.assert_same(kills.load(output / "model_final.pth"), kills.load(whole / "model_final.pth"))
    # The line of the step it was stopped after is one more.
    assert set(kills.metrics(whole)) <= set(kills.metrics(output))


def test_under_nohup_a_closed_terminal_is_no_notice(interruptible):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    previous = handle(lambda *_: None)
    try:
        assert signal.SIGHUP not in previous and signal.SIGTERM in previous
        _send(signal.SIGHUP)
    finally:
        restore(previous)
        signal.signal(signal.SIGHUP, before)


def _child(folder: Path) -> None:
    end_with_parent()
    signal.signal(signal.SIGTERM, lambda *_: (folder / "told").touch())
    (folder / "child").touch()
    signal.pause()


def _parent(folder: Path) -> None:
    multiprocessing.get_context("fork").Process(target=_child, args=(folder,)).start()
    time.sleep(60)


def test_a_killed_parent_takes_its_child_with_it(tmp_path):
    """The child gets SIGTERM, so that it can save."""
    parent = processes.start(_parent, tmp_path)
    kills.wait_for(tmp_path / "child", parent)
    parent.kill()
    parent.join()
    for _ in range(1000):
        if (tmp_path / "told").exists():
            break
        time.sleep(0.02)
    assert (tmp_path / "told").exists()
