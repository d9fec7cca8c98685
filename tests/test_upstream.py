"""What the package exchanges in detectron2, fvcore and torch is there, and looked up there."""

import inspect
import pkgutil
import re
from pathlib import Path
from types import CodeType
from typing import Set

import pytest
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer, hooks

import refbn_d2
from refbn_d2.upstream import PRIVATE, SEAMS, exchanged

PACKAGE = Path(refbn_d2.__file__).parent


def _names(code: CodeType) -> Set[str]:
    """Names that a function looks up, in its comprehensions, too."""
    inner = [_names(c) for c in code.co_consts if isinstance(c, CodeType)]
    return set(code.co_names).union(*inner)


@pytest.mark.parametrize("name", SEAMS)
def test_upstream_looks_the_exchanged_name_up(name):
    before = pkgutil.resolve_name(name)
    user = inspect.unwrap(pkgutil.resolve_name(SEAMS[name].user))
    attribute = name.replace(":", ".").rpartition(".")[2]
    assert attribute in _names(user.__code__), f"{SEAMS[name].user} no longer uses {attribute}"
    mark = object()
    with exchanged(name, mark):
        assert pkgutil.resolve_name(name) is mark
    assert pkgutil.resolve_name(name) == before


def test_an_exchange_that_the_table_does_not_explain_is_refused():
    with pytest.raises(KeyError):
        with exchanged("torch:save", None):
            pass


def test_private_names_are_there():
    for name in PRIVATE:
        module, attribute = name.split(":")
        if "." not in attribute:
            assert hasattr(pkgutil.resolve_name(module), attribute), name
    assert "_trainer" in DefaultTrainer.__init__.__code__.co_names
    hook = hooks.EvalHook(3, print)
    assert (hook._period, hook._func) == (3, print)


def test_no_other_module_exchanges_anything():
    for path in PACKAGE.rglob("*.py"):
        if path.name != "upstream.py":
            assert not re.search(r"\bmock\b", path.read_text()), path


def test_the_unsafe_reader_of_configs_is_not_used(tmp_path):
    """What the exchange is for: a tag that runs code is never given to upstream's reader."""
    file = tmp_path / "config.yaml"
    file.write_text("SEED: 3\n")
    cfg = get_cfg()
    with exchanged("detectron2.config:CfgNode.load_yaml_with_base", lambda *_, **__: {"SEED": 4}):
        cfg.merge_from_file(str(file))
    assert cfg.SEED == 4
