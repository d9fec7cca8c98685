"""get_norm knows the plugin's norms, whoever imported it when, and upstream's are as they were."""

import subprocess
import sys

import pytest
import tiny
import torch
from detectron2.config import LazyCall, instantiate
from detectron2.layers import BatchNorm2d, FrozenBatchNorm2d, NaiveSyncBatchNorm, ShapeSpec
from detectron2.layers import get_norm as exported_get_norm
from detectron2.layers.batch_norm import get_norm
from detectron2.modeling.backbone import FPN, ResNet
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicStem
from torch import nn

from refbn_d2 import RefBatchNorm2d, registry
from refbn_d2.errors import UserError

# Modules of detectron2 that bind get_norm by name.
USERS = ["modeling.backbone.resnet", "modeling.backbone.fpn", "modeling.roi_heads.mask_head"]

CHECK = f"""
import importlib
from refbn_d2 import RefBatchNorm2d
for name in {USERS}:
    norm = importlib.import_module("detectron2." + name).get_norm("RefBN", 6)
    assert type(norm) is RefBatchNorm2d and norm.num_features == 6, name
"""

# The modules of somebody else that bound get_norm before.
THIRD_PARTY = "from detectron2.layers import get_norm as theirs; old = theirs\n"

ORDERS = {
    "plugin first": "import refbn_d2, detectron2.modeling\n" + CHECK,
    "detectron2 first": "import detectron2.modeling, refbn_d2\n" + CHECK,
    "third party before": THIRD_PARTY
    + "import refbn_d2\nassert theirs is old\n"
    + CHECK
    + "assert type(theirs('RefBN', 6)) is RefBatchNorm2d\n"
    + "import detectron2.layers.batch_norm as b; assert b.get_norm is theirs\n",
}

# A finder that knows no detectron2, as on a machine without it.
WITHOUT = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "detectron2":
            raise ModuleNotFoundError(f"No module named {name!r}", name="detectron2")
sys.meta_path.insert(0, Blocker())
"""


def _python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=tiny.environment(),
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("order", ORDERS)
def test_import_order_does_not_matter(order):
    run = _python(ORDERS[order])
    assert run.returncode == 0, run.stderr


def test_norms_alone_need_no_detectron2():
    run = _python(
        WITHOUT
        + """
from refbn_d2.norms import RefBatchNorm2d
import refbn_d2.norms.functional, torch
RefBatchNorm2d(3)(torch.randn(2, 3, 4, 4))
try:
    import refbn_d2
    refbn_d2.capture_reference
except ModuleNotFoundError as e:
    print(e)
"""
    )
    assert run.returncode == 0, run.stderr
    assert "pip install" in run.stdout and "github.com/facebookresearch/detectron2" in run.stdout


@pytest.mark.parametrize(
    "code",
    [
        "import refbn_d2; refbn_d2.add_refbn_config",
        "from refbn_d2 import capture_reference",
        "import refbn_d2.engine",
        "import refbn_d2.data",
        "import refbn_d2.commands.train",
    ],
)
def test_the_plugin_without_detectron2_says_how_to_install_it(code):
    run = _python(WITHOUT + code)
    assert run.returncode != 0
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("ModuleNotFoundError: refbn_d2 needs detectron2")
    assert "pip install --no-build-isolation git+https://" in last


def test_registering_again_changes_nothing():
    code, upstream = get_norm.__code__, get_norm.refbn_upstream
    registry.register()
    assert get_norm.__code__ is code and get_norm.refbn_upstream is upstream
    assert get_norm is exported_get_norm
    assert type(get_norm("RefBN", 3)) is RefBatchNorm2d


CLASSES = {name: kind for name, kind in registry.NORMS.items() if isinstance(kind, type)}


def test_gn8_is_group_norm_of_8_groups():
    norm = get_norm("GN8", 16)
    assert type(norm) is nn.GroupNorm and (norm.num_groups, norm.num_channels) == (8, 16)


def test_ln_normalizes_over_the_channels_of_each_pixel():
    x = torch.randn(2, 5, 3, 4)
    y = get_norm("LN", 5)(x)
    expected = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("name, kind", CLASSES.items())
def test_every_name_gives_its_module(name, kind):
    norm = get_norm(name, 5)
    assert type(norm) is kind and norm.num_features == 5


@pytest.mark.parametrize(
    "name, kind",
    {
        "BN": BatchNorm2d,
        "FrozenBN": FrozenBatchNorm2d,
        "GN": nn.GroupNorm,
        "nnSyncBN": nn.SyncBatchNorm,
        "naiveSyncBN": NaiveSyncBatchNorm,
    }.items(),
)
def test_upstream_names_are_upstreams(name, kind):
    norm = get_norm(name, 32)
    assert type(norm) is type(get_norm.refbn_upstream(name, 32))
    assert type(norm) is kind


def test_what_is_not_a_name_is_upstreams_business():
    assert get_norm("", 4) is None and get_norm(None, 4) is None
    assert isinstance(get_norm(lambda n: nn.GroupNorm(2, n), 4), nn.GroupNorm)


@pytest.mark.parametrize("name", ["RefBn", "Nonsense", "refbn"])
def test_an_unknown_name_lists_the_known(name):
    with pytest.raises(KeyError) as e:
        get_norm(name, 4)
    assert isinstance(e.value, UserError)
    message = str(e.value)
    assert repr(name) in message
    assert all(n in message for n in ("BN", "FrozenBN", "GN", "RefBN", "SyncRefBN"))
    # What is listed works.
    for n in registry.known_norms():
        assert isinstance(get_norm(n, 32), nn.Module), n


def test_a_lazy_config_builds_it():
    """As in detectron2's Python configs: calls are described first and made later."""
    config = LazyCall(FPN)(
        bottom_up=LazyCall(ResNet)(
            stem=LazyCall(BasicStem)(in_channels=3, out_channels=8, norm="RefBN"),
            stages=LazyCall(ResNet.make_default_stages)(depth=18, norm="RefBN"),
            out_features=["res2", "res3", "res4", "res5"],
        ),
        in_features=["res2", "res3", "res4", "res5"],
        out_channels=8,
        norm="RefBN",
        top_block=LazyCall(LastLevelMaxPool)(),
    )
    config.bottom_up.stem.out_channels = 64
    model = instantiate(config)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    # Stem, 8 blocks of two convolutions, 3 shortcuts; in the FPN 4 lateral and 4 output ones.
    assert len(norms) == 1 + 16 + 3 + 8
    assert {type(m) for m in norms} == {RefBatchNorm2d}
    assert model.output_shape()["p2"] == ShapeSpec(channels=8, stride=4)
