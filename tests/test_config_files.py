"""Configs that come with the package are found by name."""

from pathlib import Path

import pytest
import tiny

import refbn_d2
from refbn_d2.config_files import config_names, find_config
from refbn_d2.errors import UserError

NAME = "Quick/mask_rcnn_R_50_C4_quick_refbn.yaml"


def test_every_config_has_a_name():
    assert {refbn_d2.get_config_file(name) for name in config_names()} == {
        str(path) for path in (tiny.ROOT / "configs").rglob("*.*")
    }


def test_a_file_wins_over_a_shipped_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(find_config(NAME)) == tiny.ROOT / "configs" / NAME
    Path("Quick").mkdir()
    Path(NAME).touch()
    assert find_config(NAME) == NAME
    assert find_config("") == "" and find_config("detectron2://x.yaml") == "detectron2://x.yaml"


@pytest.mark.parametrize("find", [refbn_d2.get_config_file, find_config])
def test_an_unknown_name_is_answered_with_the_likeliest(find):
    with pytest.raises(UserError, match=f"rcnn_quick_refbn.*did you mean {NAME}"):
        find("Quick/mask_rcnn_quick_refbn.yaml")
