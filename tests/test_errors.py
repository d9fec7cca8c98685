"""A mistake of a user gives one line, any other error a traceback."""

import errno
import logging
import re

import pytest
import torch
from torch.utils.data import DataLoader

from refbn_d2.errors import UserError, one_line_errors


class Failing(torch.utils.data.Dataset):
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 1

    def __getitem__(self, k):
        raise self.error


def _command(error):
    @one_line_errors
    def main():
        raise error

    return main


def test_a_mistake_is_one_line_and_status_1(capsys):
    with pytest.raises(SystemExit) as e:
        _command(UserError("the thing is wrong:\n  do this"))()
    assert e.value.code == 1
    assert capsys.readouterr().err == "error: the thing is wrong: do this\n"


def test_debugging_keeps_every_traceback(monkeypatch, caplog):
    error = UserError("the thing is wrong")
    monkeypatch.setenv("REFBN_DEBUG", "1")
    with pytest.raises(UserError) as e:
        _command(error)()
    assert e.value is error
    try:
        raise error
    except UserError:
        logging.getLogger("detectron2.engine.train_loop").exception("while training")
    assert caplog.records[-1].exc_info is not None
    monkeypatch.setenv("REFBN_DEBUG", "0")
    with pytest.raises(SystemExit):
        _command(error)()


def test_a_mistake_found_by_a_worker_process(capsys):
    @one_line_errors
    def main():
        list(DataLoader(Failing(UserError("image 7 is broken")), num_workers=1))

    with pytest.raises(SystemExit) as e:
        main()
    assert e.value.code == 1 and capsys.readouterr().err == "error: image 7 is broken\n"


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyError("UserErrors"), RuntimeError("x")])
def test_everything_else_keeps_its_traceback(error):
    with pytest.raises(type(error)) as e:
        _command(error)()
    assert e.value is error


def test_interrupted_by_the_keyboard(capsys):
    with pytest.raises(SystemExit) as e:
        _command(KeyboardInterrupt())()
    assert e.value.code == 130 and "run the same command again" in capsys.readouterr().err


def test_the_log_has_no_traceback_of_a_mistake(caplog):
    @one_line_errors
    def main(error):
        try:
            raise error
        except Exception:
            logging.getLogger("detectron2.engine.train_loop").exception("while training")

    main(UserError("mine"))
    main(ValueError("bug"))
    mine, bug = caplog.records[-2:]
    assert mine.exc_info is None and bug.exc_info is not None


def test_arguments_and_result_pass_through():
    assert one_line_errors(lambda a, b=0: a + b)(1, b=2) == 3


@pytest.mark.parametrize(
    "error, message",
    [
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "x.json"),
            "x.json: File name too long",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/log"),
            "out/log cannot .*No space.*--resume",
        ),
        (
            OSError(errno.EDQUOT, "Disk quota exceeded"),
            "a file of the run cannot .*quota.*--resume",
        ),
        (
            RuntimeError("[x/gloo/transport/tcp/pair.cc:545] Connection reset by peer"),
            "is lost.*--resume",
        ),
    ],
)
def test_errors_of_the_system_are_one_line(capsys, error, message):
    with pytest.raises(SystemExit) as e:
        _command(error)()
    line = capsys.readouterr().err
    assert e.value.code == 1 and line.count("\n") == 1
    assert re.search(f"error: .*{message}", line)


def test_the_log_has_the_line_in_place_of_the_traceback(caplog):
    with pytest.raises(SystemExit):  # the filter is there from here on
        _command(UserError("unused"))()
    try:
        raise RuntimeError("in gloo/transport/tcp/pair.cc") from None
    except RuntimeError:
        logging.getLogger("detectron2.engine.train_loop").exception("Exception during training:")
    record = caplog.records[-1]
    assert record.exc_info is None and "training: the connection to" in record.getMessage()
