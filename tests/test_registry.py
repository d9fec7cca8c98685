"""get_norm builds the plugin's norms and upstream's, independently of the import order."""

import subprocess
import sys
from functools import partial

import pytest
import tiny
import torch
from detectron2.config import LazyCall, instantiate
from detectron2.layers import (
    BatchNorm2d,
    CycleBatchNormList,
    FrozenBatchNorm2d,
    NaiveSyncBatchNorm,
    ShapeSpec,
)
from detectron2.layers import get_norm as exported_get_norm
from detectron2.layers.batch_norm import get_norm
from detectron2.modeling.backbone import FPN, ResNet, build_backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicStem
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import refbn_d2
from refbn_d2 import RefBatchNorm2d, registry
from refbn_d2.config import apply_norm_config, load_config
from refbn_d2.errors import UserError
from refbn_d2.norms import NORM_TYPES, capture, convert_norm, fold_norms

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

# An import finder that does not find detectron2, as on a machine without it.
WITHOUT = """
import sys
from functools import partial
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


CLASSES = {name: t.kind for name, t in NORM_TYPES.items() if t.kind is not None}


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
    assert type(norm) is kind and len(norm.weight) == 5


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


class ScaledBatchNorm2d(nn.BatchNorm2d):
    """A user's norm: BatchNorm whose training output is scaled by an option of the config."""

    scale = 1.0

    def forward(self, x):
        return super().forward(x) * (self.scale if self.training else 1.0)


@pytest.fixture
def scaled_norm():
    refbn_d2.register_norm(
        "ScaledBN",
        ScaledBatchNorm2d,
        affine_in_eval=True,
        configure=lambda layer, cfg: setattr(layer, "scale", cfg.MODEL.REFBN.PSEUDO_COUNT),
    )
    yield "ScaledBN"
    refbn_d2.unregister_norm("ScaledBN")


def test_a_norm_of_the_users_own_is_built_and_configured_from_a_config(scaled_norm):
    cfg = load_config(
        tiny.CONFIG,
        ["MODEL.RESNETS.NORM", scaled_norm, "MODEL.DEVICE", "cpu", "MODEL.REFBN.PSEUDO_COUNT", 3.0],
    )
    model = apply_norm_config(build_backbone(cfg), cfg)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) > 10 and {type(m) for m in norms} == {ScaledBatchNorm2d}
    assert {m.scale for m in norms} == {3.0}


def test_a_norm_of_the_users_own_is_converted_and_folded(scaled_norm):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model(torch.randn(4, 3, 5, 5) + 1)
    x = torch.randn(2, 3, 5, 5)
    wanted = model.eval()(x)
    assert type(convert_norm(model, scaled_norm)[1]) is ScaledBatchNorm2d
    assert torch.equal(model(x), wanted)
    assert type(fold_norms(model)[1]) is nn.Identity
    assert torch.allclose(model(x), wanted, atol=1e-5)


def test_a_norm_of_the_users_own_is_listed_and_forgotten_again(scaled_norm):
    assert scaled_norm in registry.known_norms()
    with pytest.raises(UserError, match=scaled_norm):
        get_norm("Nonsense", 4)
    refbn_d2.unregister_norm(scaled_norm)
    with pytest.raises(UserError, match="unknown norm 'ScaledBN'"):
        get_norm(scaled_norm, 4)
    with pytest.raises(ValueError, match="'ScaledBN'"):
        convert_norm(nn.BatchNorm2d(3), scaled_norm)
    refbn_d2.register_norm(scaled_norm, ScaledBatchNorm2d)  # the fixture takes it out


def test_a_norm_that_is_no_batch_norm_is_refused_by_conversion_and_left_by_folding():
    refbn_d2.register_norm("GN2", lambda channels: nn.GroupNorm(2, channels))
    try:
        assert type(get_norm("GN2", 4)) is nn.GroupNorm
        with pytest.raises(ValueError, match="cannot convert to norm 'GN2'"):
            convert_norm(nn.BatchNorm2d(4), "GN2")
        model = nn.Sequential(nn.Conv2d(3, 4, 1), get_norm("GN2", 4)).eval()
        assert type(fold_norms(model)[1]) is nn.GroupNorm
    finally:
        refbn_d2.unregister_norm("GN2")


@pytest.mark.parametrize("name", ["BN", "GN", "LN", "FrozenBN", "RefBN"])
def test_a_name_that_is_taken_cannot_be_registered(name):
    with pytest.raises(ValueError, match=f"norm type '{name}' exists already"):
        refbn_d2.register_norm(name, nn.BatchNorm2d)


def test_bad_registrations():
    with pytest.raises(ValueError, match="a norm type needs a name"):
        refbn_d2.register_norm("", nn.BatchNorm2d)
    with pytest.raises(ValueError, match="the class of its layers is unknown"):
        refbn_d2.register_norm("X", lambda channels: nn.BatchNorm2d(channels), convertible=True)
    with pytest.raises(ValueError, match="'RefBN' was not added by register_norm"):
        refbn_d2.unregister_norm("RefBN")


def _retinanet_head(norm, **kwargs):
    shapes = [ShapeSpec(channels=8)] * 3
    return RetinaNetHead(
        input_shape=shapes, num_classes=2, num_anchors=1, conv_dims=[8], norm=norm, **kwargs
    )


@pytest.mark.parametrize("norm", ["RefBN", "SyncRefBN", "EvalRefBN", "VBN", "BRN", "MABN"])
def test_retinanets_levels_have_statistics_of_their_own(norm):
    torch.manual_seed(0)
    head = _retinanet_head(norm)
    levels = head.cls_subnet[1]
    assert isinstance(levels, CycleBatchNormList) and len(levels) == 3
    assert {type(m) for m in levels} == {NORM_TYPES[norm].kind}
    features = [torch.randn(2, 8, size, size) + size for size in (8, 4, 2)]
    if NORM_TYPES[norm].holds_reference:
        with capture(head) as taken:
            head(features)
        assert len(taken) == 6 and levels.has_reference
        for m, feature in zip(levels, features):
            seen = head.cls_subnet[0](feature).mean((0, 2, 3))
            assert torch.allclose(m.ref_mean, seen, atol=1e-4)
        before = levels.ref_mean.clone()
    head(features)
    assert all(m.num_batches_tracked == 1 for m in levels)
    if NORM_TYPES[norm].holds_reference:
        assert torch.equal(levels.ref_mean, before)


def test_retinanets_levels_have_the_options_of_a_norm_of_ones_own():
    build = partial(RefBatchNorm2d, pseudo_count=5.0, eps=1e-3)
    refbn_d2.register_norm("RefBN5", build, kind=RefBatchNorm2d)
    try:
        levels = _retinanet_head("RefBN5").cls_subnet[1]
    finally:
        refbn_d2.unregister_norm("RefBN5")
    assert isinstance(levels, CycleBatchNormList)
    assert [(m.pseudo_count, m.eps, m.affine, m.weight, m.bias) for m in levels] == [
        (5.0, 1e-3, False, None, None)
    ] * 3


def test_retinanet_with_upstreams_norms_is_as_it_was():
    assert type(_retinanet_head("BN").cls_subnet[1]) is CycleBatchNormList
    assert type(_retinanet_head("FrozenBN", prior_prob=0.5).cls_subnet[1]) is FrozenBatchNorm2d
    assert type(_retinanet_head("").cls_subnet[1]) is nn.ReLU


def test_a_norm_that_retinanets_levels_share_is_warned_of(caplog):
    _retinanet_head("SN")
    assert "SN" in caplog.text and "Shared BatchNorm" in caplog.text
    caplog.clear()
    _retinanet_head("IN")
    assert not caplog.text


@pytest.mark.parametrize("norm", ["RefBN", "SyncRefBN", "VBN", "BRN", "MABN", "SN", "IN"])
@pytest.mark.parametrize("held", [True, False])
def test_symbolic_traces_have_the_norms_as_leaves(norm, held):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), get_norm(norm, 4), nn.ReLU())
    if held:
        with capture(model):
            model(torch.randn(2, 3, 4, 4))
    model.eval()
    x = torch.randn(2, 3, 5, 5)
    for traced in (
        torch.fx.symbolic_trace(model),
        lambda x: create_feature_extractor(model, ["1"])(x)["1"].relu(),
    ):
        assert torch.equal(traced(x), model(x))
