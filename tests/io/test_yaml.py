"""YAML is read as data; bad files are in tests/corpus."""

import datetime
import json

import pytest
import yaml

from refbn_d2.errors import UserError
from refbn_d2.io import yaml as plain_yaml


def _read(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    return plain_yaml.read(str(tmp_path / "a.yaml"))


def test_plain_content(tmp_path):
    text = "a: [1, 2.5, x, null, true, 2020-02-03]\nb: &b {c: é}\nd: [*b, *b]\n"
    assert _read(tmp_path, text) == {
        "a": [1, 2.5, "x", None, True, datetime.date(2020, 2, 3)],
        "b": {"c": "é"},
        "d": [{"c": "é"}] * 2,
    }


def test_size_counts_what_aliases_stand_for(tmp_path):
    """10 * 10**4 values are beyond the limit of 10**5, 9 * 10**4 are not."""
    row = f"- &row [{', '.join('1' * 9_999)}]\n"
    assert len(_read(tmp_path, row + f"- [{', '.join(['*row'] * 8)}]\n")[1]) == 8
    with pytest.raises(UserError, match="a.yaml: .*aliases expand beyond"):
        _read(tmp_path, row + f"- [{', '.join(['*row'] * 9)}]\n")


def test_a_folder_or_a_device_is_no_file(tmp_path):
    for path in (tmp_path, "/dev/zero", tmp_path / "nowhere.yaml"):
        with pytest.raises(UserError, match="no such file"):
            plain_yaml.read(str(path))


@pytest.mark.parametrize(
    "text",
    "1 -1 +1 0 010 0x1F 0b101 1_000 1.5 -.5 .5 1.e+3 1.5e-3 .inf -.INF .nan 1. ~ 09 0o7".split(),
)
def test_numbers_are_pyyamls(tmp_path, text):
    """But for those to the base of 60, which are text."""
    value = _read(tmp_path, f"a: {text}\n")["a"]
    wanted = yaml.safe_load(text)
    assert type(value) is type(wanted) and repr(value) == repr(wanted)
    assert _read(tmp_path, "a: [1:30, 59:59:59, 1:30.5]\n") == {"a": ["1:30", "59:59:59", "1:30.5"]}


RETINANET = "[[x, x * 2**(1.0/3), x * 2**(2.0/3) ] for x in [32, 64, 128, 256, 512 ]]"


@pytest.mark.parametrize(
    "text", [RETINANET, "[[x] for x in [8.5]]", "[[x * 2 ** (1/2)] for x in [4,8]]"]
)
def test_anchor_sizes_of_upstreams_retinanet_are_computed(tmp_path, text):
    content = _read(tmp_path, f"SIZES: !!python/object/apply:eval [{json.dumps(text)}]\n")
    assert content == {"SIZES": eval(text)}  # what detectron2 does with it


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').getcwd()",
        "[[x, y] for x in [32]]",
        "[[x * 9**(9/1)] for x in [32]]",
        "[[x] for x in [32, open]]",
        "[[x] for x in [32]] + [1]",
        "[[x * 2**(1/0)] for x in [32]]",
        "",
    ],
)
def test_no_other_code_is_evaluated(tmp_path, text):
    with pytest.raises(UserError, match="line 1: not plain YAML"):
        _read(tmp_path, f"SIZES: !!python/object/apply:eval [{json.dumps(text)}]\n")
