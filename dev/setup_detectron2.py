#!/usr/bin/env python3
"""Installs detectron2 into the running Python.

1. If a working detectron2 can be imported, nothing is done.
2. Otherwise the official source is compiled, at a pinned commit.
3. If it cannot be reached, the sdist of release 0.6 on PyPI is installed. It has the Python files
   but not the C++ sources, so it is installed as pure Python; torchvision does NMS and RoIAlign.

This script uses the standard library only; torch must already be installed.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

REPOSITORY = "https://github.com/facebookresearch/detectron2.git"
COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"
SDIST = "pb1-detectron2==0.6"
SDIST_SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"
NETWORK_TIMEOUT = 20  # seconds

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
INSTALL = [*PIP, "install", "--no-deps", "--no-build-isolation"]

STAND_IN = '''"""Stands in for the C++ extension, which this pure-Python installation lacks."""


# detectron2 writes these to the log when training starts.
def get_compiler_version():
    return "none, installed as pure Python"


def get_cuda_version():
    return "none, installed as pure Python"


def has_cuda():
    return False


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    raise RuntimeError(
        f"detectron2._C.{name} is not available: this detectron2 was installed as pure Python. "
        "Rotated boxes, deformable convolution and COCOeval_opt need the official source: "
        "pip install --no-build-isolation git+@REPOSITORY@@@COMMIT@"
    )
'''.replace("@REPOSITORY@", REPOSITORY).replace("@COMMIT@", COMMIT)


def installed() -> str:
    """Version and kind of the detectron2 that can be imported, or '' if none works."""
    if importlib.util.find_spec("detectron2") is None:
        return ""
    probe = (
        "import detectron2, detectron2._C as c, detectron2.engine; "
        "print(detectron2.__version__, 'pure Python' if c.__file__.endswith('.py') else 'compiled')"
    )
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", probe], capture_output=True, text=True
    )
    return run.stdout.strip() if run.returncode == 0 else ""


def source_is_reachable() -> bool:
    if shutil.which("git") is None:
        return False
    env = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    try:
        subprocess.run(
            ["git", "ls-remote", "--exit-code", REPOSITORY, "HEAD"],
            env=env,
            timeout=NETWORK_TIMEOUT,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    except (subprocess.SubprocessError, OSError):
        return False
    return True


def install_source() -> bool:
    run = subprocess.run([*INSTALL, f"git+{REPOSITORY}@{COMMIT}"], capture_output=True, text=True)
    if run.returncode != 0:
        print(
            "detectron2: the official source did not build:",
            *run.stderr.splitlines()[-3:],
            sep="\n  ",
        )
    return run.returncode == 0


def install_sdist() -> None:
    with tempfile.TemporaryDirectory() as tmp:
        # pip refuses a file whose hash differs.
        requirement = Path(tmp, "requirements.txt")
        requirement.write_text(f"{SDIST} --hash=sha256:{SDIST_SHA256}\n")
        download = [*PIP, "download", "--no-deps", "--no-build-isolation", "--no-binary", ":all:"]
        subprocess.run(
            [*download, "--require-hashes", "-r", str(requirement), "-d", tmp], check=True
        )
        (archive,) = Path(tmp).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(Path(tmp, "src"), filter="data")
        (root,) = Path(tmp, "src").iterdir()
        make_pure_python(root)
        subprocess.run([*INSTALL, str(root)], check=True)


def make_pure_python(root: Path) -> None:
    """Edits the unpacked sdist: its name, no extension, and names that NumPy and Pillow removed."""

    def edit(path: str, pattern: str, replacement: str) -> None:
        file = root / path
        text, count = re.subn(pattern, replacement, file.read_text())
        if count == 0:
            sys.exit(f"detectron2: {path} has no {pattern!r}; is this release 0.6?")
        file.write_text(text)

    edit("setup.py", r'name="[^"]+"', 'name="detectron2"')
    edit("setup.py", r"ext_modules=get_extensions\(\)", "ext_modules=[]")
    edit("detectron2/data/transforms/transform.py", r"\bImage\.LINEAR\b", "Image.BILINEAR")
    edit("detectron2/evaluation/coco_evaluation.py", r"use_fast_impl=True", "use_fast_impl=False")
    # The sdist has no configs of the model zoo, so its error message is changed to say so.
    edit(
        "detectron2/model_zoo/model_zoo.py",
        r'"\{\} not available in Model Zoo!"',
        '"{} not available in Model Zoo! (This detectron2 was installed as pure Python from '
        "PyPI, without the zoo's configs; they are in the folder configs of "
        'https://github.com/facebookresearch/detectron2. refbn_d2.get_config_file has others.)"',
    )
    for file in (root / "detectron2").rglob("*.py"):
        text = file.read_text()
        new = re.sub(r"\bnp\.(bool|int|float)\b", r"\1", text)
        if new != text:
            file.write_text(new)
    (root / "detectron2" / "_C.py").write_text(STAND_IN)


def main() -> None:
    found = installed()
    if found:
        print(f"detectron2: using the installed one ({found})")
        return
    if source_is_reachable() and install_source():
        print(f"detectron2: installed the official source at {COMMIT[:8]}; it lacks nothing")
        return
    try:
        install_sdist()
    except subprocess.CalledProcessError as e:
        sys.exit(f"detectron2: PyPI's {SDIST} could not be installed either: {e}")
    if not installed():
        sys.exit("detectron2: installed, but cannot be imported; delete .venv and try again")
    print(
        "detectron2: official source not available, installed release 0.6 from PyPI as pure "
        "Python; it lacks rotated boxes, deformable convolution and the C++ COCOeval"
    )


if __name__ == "__main__":
    main()
