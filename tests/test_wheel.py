"""The wheel is complete: installed elsewhere, it has all files and its command trains."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import tiny

SOURCES = [
    "configs",
    "refbn_d2",
    "LICENSE",
    "MANIFEST.in",
    "README.md",
    "pyproject.toml",
    "setup.py",
]
# What users of the norms alone need not install.
OPTIONAL = ["cv2", "hotcoco", "jinja2", "matplotlib", "rich", "scipy", "sklearn", "timm"]


def _check(command, **kwargs) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    # A copy: an earlier build in the checkout would leave its files in the wheel.
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        source = tiny.ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    _check([*pip, "--wheel-dir", copy / "dist", copy])
    (file,) = (copy / "dist").glob("*.whl")
    return file


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """The bin folder of a virtual environment with the wheel, which sees this one's packages."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin/python"
    site = Path(
        _check([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip()
    )
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--ignore-installed"]
    _check([*pip, wheel])
    return folder / "bin"


def _outside() -> dict:
    """Environment variables without the path of the checkout."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}


def test_wheel_has_every_file_of_the_package_and_all_configs(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, prefix in [
        (tiny.ROOT / "refbn_d2", "refbn_d2"),
        (tiny.ROOT / "configs", "refbn_d2/configs"),
    ]:
        files = {p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
        assert files, folder
        assert {f"{prefix}/{p.relative_to(folder).as_posix()}" for p in files} <= names


def test_wheel_says_what_it_is(environment):
    script = (
        "import json; from importlib.metadata import metadata; "
        "print(json.dumps(metadata('refbn_d2').json))"
    )
    about = json.loads(
        _check([environment / "python", "-c", script], cwd=environment, env=_outside())
    )
    assert about["license_expression"] == "Apache-2.0"
    assert about["project_url"] and "Typing :: Typed" in about["classifier"]
    required = {r.split(";")[0].strip() for r in about["requires_dist"] if "extra ==" not in r}
    assert not any(
        r.startswith(("scipy", "scikit", "matplotlib", "rich", "hotcoco", "opencv"))
        for r in required
    )


def test_installed_command_trains_from_a_shipped_config(environment, tmp_path):
    tiny.write(tmp_path)
    opts = tiny.opts(
        DATASETS__TRAIN="('coco_2017_train',)",
        DATASETS__TEST="('coco_2017_val',)",
        OUTPUT_DIR=tmp_path / "run",
    )
    config = ["--config-file", "Quick/mask_rcnn_R_50_C4_quick_refbn.yaml", "--num-gpus", 0]
    env = {**_outside(), "DETECTRON2_DATASETS": str(tmp_path), "OMP_NUM_THREADS": "1"}
    _check([environment / "refbn-d2", "train", *config, *opts], cwd=tmp_path, env=env)
    assert (tmp_path / "run/model_final.pth").is_file()
    results = json.loads((tmp_path / "run/metrics.json").read_text().splitlines()[-1])
    assert results["iteration"] == 1 or "bbox/AP" in results


def test_the_norms_need_no_extra_and_the_rest_names_its_own(tmp_path):
    # None in sys.modules is how Python marks a module that cannot be imported.
    script = f"""
import sys
sys.modules.update(dict.fromkeys({OPTIONAL}))
import refbn_d2, refbn_d2.engine, refbn_d2.classification
from refbn_d2.__main__ import run_command
from refbn_d2.data.quick import digit_samples
try:
    digit_samples("val")
except refbn_d2.errors.UserError as e:
    print(e, file=sys.stderr)
run_command("compare")
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=tiny.environment(),
    )
    quick, report = done.stderr.splitlines()
    assert quick == "sklearn is not installed: pip install 'refbn_d2[quick]'"
    assert report.startswith("error: ") and report.endswith("pip install 'refbn_d2[report]'")
    assert done.returncode == 1
