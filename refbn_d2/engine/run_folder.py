"""OUTPUT_DIR of a run: locked by one run at a time, with errors if it cannot be written."""

import contextlib
import errno
import os
import re
import socket
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List

import yaml
from detectron2.config import CfgNode
from detectron2.utils import comm

from ..errors import UserError
from ..io import yaml as plain_yaml
from ..io.atomic import PARTIAL
from ..io.lock import FILE, folder_lock

__all__ = ["check_exists", "check_path", "output_errors", "run_folder"]

# Names of the files that a training run writes.
_FILES = re.compile(
    r"model_(\d{7,}|final)\.pth|last_checkpoint|metrics\.json|config\.yaml|reference\.json"
    r"|inference|log\.txt(\.rank\d+)?|events\.out\.tfevents\..*"
)
# A run that has saved or logged a step has at least one of these files.
_CHECKPOINTS = "model_*.pth"
_LINES = "metrics.json"
_EARLIER = "earlier_run_"
# Seconds after which a network file system shows files that another machine has written.
_NETWORK_DELAY = 60

# Keys that change the model or the random numbers of a run. A resumed run must not change them. All
# other keys may be changed when a run is resumed.
_FIXED = re.compile(r"MODEL\..*|INPUT\.FORMAT|SEED")
# Exceptions: the device, the initial weights, and keys that only evaluation uses.
_FREE = re.compile(r"MODEL\.DEVICE|MODEL\.WEIGHTS|MODEL\..*_TEST")


def _is_local(folder: str) -> bool:
    """Whether a folder is a local path and not the address of a remote storage."""
    return bool(folder) and "://" not in folder


def check_path(folder: Any) -> None:
    """Raises a UserError if OUTPUT_DIR is not a local path, as it has to be on the command line."""
    if not folder or not _is_local(folder):
        raise UserError(f"OUTPUT_DIR is {folder!r}: use the path of a folder on this machine")


@contextmanager
def run_folder(cfg: CfgNode, resume: bool) -> Iterator[List[str]]:
    """Context manager that locks OUTPUT_DIR for this run.

    A new run moves the files of an earlier run to a subfolder. Otherwise, --resume would continue
    from the weights of the earlier run if the new one ended before its first checkpoint, and
    metrics.json would mix both runs.

    Every process of the run must call this.

    Args:
        cfg: Config of the run.
        resume: Whether to continue the run in OUTPUT_DIR, if there is one.

    Yields:
        Messages about the folder for the log. The list is empty on all processes but the main one.

    Raises:
        UserError: If another process uses the folder, if it cannot be written, or if it contains a
            run of another model.
    """
    notes: List[str] = []
    problem = ""
    with ExitStack() as stack:
        if comm.is_main_process() and _is_local(cfg.OUTPUT_DIR):
            folder = Path(cfg.OUTPUT_DIR)
            try:
                stack.enter_context(output_errors(cfg.OUTPUT_DIR))
                stack.enter_context(_quiet_writer_threads())
                stack.enter_context(folder_lock(folder))
                for leftover in filter(Path.is_file, folder.glob("*" + PARTIAL)):
                    leftover.unlink()
                notes += _finish_moving(folder)
                notes += _changes(cfg, folder) if resume else _move_earlier_run(cfg, folder)
            except (UserError, OSError) as e:
                problem = str(e)
        problem = comm.all_gather(problem)[0]
        if problem:
            raise UserError(problem)
        if _is_local(cfg.OUTPUT_DIR):
            _check_shared(Path(cfg.OUTPUT_DIR))
        yield notes


def _check_shared(folder: Path) -> None:
    """Raises a UserError if a process does not see the lock file that the main process wrote."""
    # The main process must not open it: that would end the lock.
    owner = comm.all_gather(f"{os.getpid()} on {socket.gethostname()}")[0]
    end = time.monotonic() + _NETWORK_DELAY
    found = comm.is_main_process()
    while not found:
        with contextlib.suppress(OSError):
            found = (folder / FILE).read_text() == owner
        if found or time.monotonic() > end:
            break
        time.sleep(0.5)
    hosts = comm.all_gather("" if found else socket.gethostname())
    missing = sorted(set(hosts) - {""})
    if missing:
        raise UserError(
            f"OUTPUT_DIR {folder} of the first process is not the one on {', '.join(missing)}: "
            "all machines must share it"
        )


@contextmanager
def _quiet_writer_threads() -> Iterator[None]:
    """Suppresses tracebacks of OSErrors in TensorBoard's thread.

    The trainer gets the same error from its own files and reports it.
    """
    previous = threading.excepthook

    def hook(args):
        if not isinstance(args.exc_value, OSError):
            previous(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = previous


def _move_earlier_run(cfg: CfgNode, folder: Path) -> List[str]:
    """Moves the files of an earlier run to a subfolder, if that run has saved or logged a step."""
    files = [p for p in folder.iterdir() if _FILES.fullmatch(p.name)]
    if not any(p.match(_CHECKPOINTS) or p.match(_LINES) for p in files):
        return []
    target = _new_subfolder(folder)
    weights = cfg.MODEL.WEIGHTS
    if _is_local(weights) and Path(weights).resolve() in [p.resolve() for p in files]:
        raise UserError(
            f"MODEL.WEIGHTS {weights} belongs to the run in OUTPUT_DIR, which a new run moves to "
            f"{target}: choose another OUTPUT_DIR, or continue that run with --resume"
        )
    target.with_name(target.name + PARTIAL).mkdir()
    return _finish_moving(folder)


def _new_subfolder(folder: Path) -> Path:
    """Returns the path for the files of the newest earlier run; its number is the highest."""
    names = [p.name[len(_EARLIER) :].split(".")[0] for p in folder.glob(_EARLIER + "*")]
    return folder / f"{_EARLIER}{1 + max((int(n) for n in names if n.isdecimal()), default=0)}"


def _finish_moving(folder: Path) -> List[str]:
    """Moves the remaining files of an earlier run to the subfolder that was created for them.

    This also completes a move during which a process was killed.
    """
    notes = []
    for partial in folder.glob(_EARLIER + "*" + PARTIAL):
        for file in folder.iterdir():
            if _FILES.fullmatch(file.name):
                file.rename(partial / file.name)
        target = partial.with_suffix("")
        if target.exists():
            target = _new_subfolder(folder)
        partial.rename(target)
        notes.append(f"The files of an earlier run are now in {target}")
    return notes


def _changes(cfg: CfgNode, folder: Path) -> List[str]:
    """Describes the config keys that differ from those of the run in the folder.

    Raises:
        UserError: If one of them must not change when a run is resumed.
    """
    path = folder / "config.yaml"
    if not path.is_file() or not any(folder.glob(_CHECKPOINTS)):
        return []
    try:
        content = plain_yaml.read(str(path))
    except UserError:
        content = None
    # If the file is not a config, the run was killed while it wrote the file.
    before = _flat(content) if isinstance(content, dict) else {}
    now = _flat(yaml.safe_load(cfg.dump()))
    changed = [k for k, value in now.items() if before.get(k, value) != value]
    for key in changed:
        if _FIXED.fullmatch(key) and not _FREE.fullmatch(key):
            raise UserError(
                f"{folder} holds a run with {key} {before[key]!r}, not {now[key]!r}: choose "
                "another OUTPUT_DIR, or resume with the config it was started with"
            )
    return [f"Resuming with {k} {now[k]!r}, was {before[k]!r}" for k in changed]


def _flat(node: Dict[str, Any], prefix: str = "") -> Dict[str, Any]:
    """Flattens nested dicts to full keys, as in KEY VALUE on the command line."""
    found: Dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, dict):
            found.update(_flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found


@contextmanager
def output_errors(folder: str) -> Iterator[None]:
    """Raises a UserError if a file in ``folder``, the OUTPUT_DIR of a run, cannot be written."""
    try:
        yield
    except OSError as e:
        file = os.fsdecode(e.filename) if isinstance(e.filename, (str, bytes)) else ""
        inside = os.path.abspath(file).startswith(os.path.abspath(folder) + os.sep)
        # An error of an open file has no file name; a run only writes to files in this folder.
        read_only = e.errno == errno.EROFS and not file
        if not _is_local(folder) or not (inside or read_only):
            raise
        check_exists(folder)
        raise UserError(
            f"{file or f'OUTPUT_DIR {folder}'} cannot be written: {e.strerror}; OUTPUT_DIR has to "
            "stay writable while a run goes on"
        ) from e


def check_exists(folder: str) -> None:
    """Raises a UserError if a run's OUTPUT_DIR was deleted; an evaluation would recreate it."""
    if _is_local(folder) and not os.path.isdir(folder):
        raise UserError(f"OUTPUT_DIR {folder} was deleted while the run went on")
