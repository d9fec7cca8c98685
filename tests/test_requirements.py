"""`make setup` installs all that the package and its extras need, at allowed versions."""

import re
import sys

import pytest
import tiny
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PROJECT = tomllib.loads((tiny.ROOT / "pyproject.toml").read_text())["project"]


def _pinned():
    lines = (tiny.ROOT / "requirements.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def test_every_requirement_of_the_package_is_pinned_within_its_range():
    extras = [r for group in PROJECT["optional-dependencies"].values() for r in group]
    pinned = _pinned()
    for requirement in map(Requirement, [*PROJECT["dependencies"], *extras]):
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} but {version}"


def test_a_missing_package_is_answered_with_an_extra_that_exists():
    source = (tiny.ROOT / "refbn_d2/extras.py").read_text()
    named = set(re.findall(r'"refbn_d2\[(\w+)\]"', source))
    assert named and named <= set(PROJECT["optional-dependencies"])
