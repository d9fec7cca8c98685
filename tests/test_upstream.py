"""The names that the package replaces in detectron2, fvcore and torch exist and are used there."""

import ast
import inspect
import pkgutil
import re
from pathlib import Path
from types import CodeType
from typing import Iterator, Set

import pytest
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer, SimpleTrainer
from detectron2.layers import batch_norm
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from detectron2.utils.file_io import PathManager

import refbn_d2
from refbn_d2.upstream import DIFFERENCES, PRIVATE, SEAMS, exchanged, whole_files

PACKAGE = Path(refbn_d2.__file__).parent


def _names(code: CodeType) -> Set[str]:
    """Names that a function looks up, in its comprehensions, too."""
    inner = [_names(c) for c in code.co_consts if isinstance(c, CodeType)]
    return set(code.co_names).union(*inner)


def _is_later() -> bool:
    """Whether detectron2 is later than 0.6, which its number does not say."""
    return hasattr(comm, "create_local_process_group")


@pytest.mark.parametrize("name", SEAMS)
def test_upstream_looks_the_exchanged_name_up(name):
    before = pkgutil.resolve_name(name)
    seam = SEAMS[name]
    user = seam.later_user if seam.later_user and _is_later() else seam.user
    attribute = name.replace(":", ".").rpartition(".")[2]
    code = inspect.unwrap(pkgutil.resolve_name(user)).__code__
    assert attribute in _names(code), f"{user} no longer uses {attribute}"
    mark = object()
    with exchanged(name, mark):
        assert pkgutil.resolve_name(name) is mark
    assert pkgutil.resolve_name(name) == before


def test_an_exchange_that_the_table_does_not_explain_is_refused():
    with pytest.raises(KeyError):
        with exchanged("torch:save", None):
            pass


# Set by a constructor: what holds them has no such attribute itself.
_SET_LATER = {"_trainer", "_hooks", "_func", "_period", "_do_evaluation"}
_SET_LATER |= {"_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks"}
_SET_LATER |= {"_non_persistent_buffers_set"}
_SET_LATER |= {"_load_state_dict_pre_hooks"}


@pytest.mark.parametrize("name", PRIVATE)
def test_a_private_name_is_there_and_used(name):
    owner, _, attribute = name.replace(":", ".").rpartition(".")
    found = pkgutil.resolve_name(owner)
    if attribute in _SET_LATER:
        # The class's source: torch._dynamo exchanges nn.Module.__init__ when something compiles.
        assert re.search(rf"\b{attribute}\b", inspect.getsource(found))
    else:
        assert hasattr(found, attribute)
    user = PACKAGE.joinpath(*PRIVATE[name].user.split("."))
    user = user / "__init__.py" if user.is_dir() else user.with_suffix(".py")
    assert re.search(rf"\b{attribute}\b", user.read_text()), f"{user} no longer uses it"


def _private_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
            yield str(getattr(node.args[1], "value", ""))


def _own_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if getattr(node.value, "id", "") in ("self", "cls"):
                yield node.attr


def test_every_private_name_that_is_used_is_listed():
    trees = [ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")]
    used = {n for t in trees for n in _private_names(t) if re.match(r"_[^_]", n)}
    listed = {part for name in PRIVATE for part in re.split("[:.]", name)}
    # Documented, in spite of their names.
    public = {"_exit", "_frombuffer"}
    assert used - listed - public - {n for t in trees for n in _own_names(t)} == set()


def test_differences_between_versions_of_detectron2():
    """This version has all of them or none: it is release 0.6, or a later one."""
    signature = inspect.signature
    has = {
        "detectron2.utils.comm:create_local_process_group": _is_later(),
        "detectron2.utils.events:EventStorage.put_scalar(cur_iter)": (
            "cur_iter" in signature(EventStorage.put_scalar).parameters
        ),
        "detectron2.engine.train_loop:SimpleTrainer.__init__(gather_metric_period)": (
            "gather_metric_period" in signature(SimpleTrainer.__init__).parameters
        ),
        "detectron2.engine.defaults:DefaultTrainer.state_dict[_trainer]": (
            "_trainer" in DefaultTrainer.state_dict.__code__.co_names
        ),
        "detectron2.layers.batch_norm:get_norm[LN]": '"LN"' in _source_of_get_norm(),
    }
    assert set(has) == set(DIFFERENCES)
    assert len(set(has.values())) == 1, has


def _source_of_get_norm() -> str:
    return Path(batch_norm.__file__).read_text().partition("def get_norm")[2]


def test_a_file_of_upstreams_is_whole_or_not_there(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt):
        with whole_files(), PathManager.open(str(path), "w") as f:
            f.write("half")
            raise KeyboardInterrupt
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(path.name, "before")]
    with whole_files():
        with PathManager.open(str(path), "w") as f:
            f.write("after")
        with PathManager.open(str(path)) as f:
            assert f.read() == "after"


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
