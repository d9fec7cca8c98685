"""Values of detectron2's keys outside of their range are named before anything is built."""

import pytest
import tiny
from detectron2.config import get_cfg
from detectron2.modeling import BACKBONE_REGISTRY, Backbone

from refbn_d2.config import load_config
from refbn_d2.config_ranges import UPSTREAM_RANGES
from refbn_d2.engine import Trainer
from refbn_d2.errors import UserError


def test_the_defaults_of_detectron2_are_in_range():
    for name, allowed in UPSTREAM_RANGES.items():
        value = get_cfg()
        for part in name.split("."):
            value = value[part]
        assert allowed.holds(value), name


@pytest.mark.parametrize(
    "key, value",
    [
        ("SOLVER.MAX_ITER", "0"),
        ("SOLVER.MAX_ITER", "-1"),
        ("SOLVER.CHECKPOINT_PERIOD", "0"),
        ("SOLVER.BASE_LR", "-0.1"),
        ("SOLVER.BASE_LR", "1e999"),
        ("SOLVER.GAMMA", "-1.0"),
        ("SOLVER.MOMENTUM", "2.0"),
        ("SOLVER.WEIGHT_DECAY", "-1.0"),
        ("SOLVER.WARMUP_METHOD", "x"),
        ("SOLVER.LR_SCHEDULER_NAME", "x"),
        ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "x"),
        ("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "0.0"),
        ("SOLVER.REFERENCE_WORLD_SIZE", "-1"),
        ("TEST.PRECISE_BN.NUM_ITER", "0"),
        ("TEST.AUG.MIN_SIZES", "()"),
        ("INPUT.MIN_SIZE_TRAIN", "()"),
        ("INPUT.MIN_SIZE_TRAIN", "(-5,)"),
        ("INPUT.MIN_SIZE_TRAIN", "('a',)"),
        ("INPUT.MAX_SIZE_TRAIN", "0"),
        ("INPUT.MIN_SIZE_TEST", "-1"),
        ("INPUT.RANDOM_FLIP", "x"),
        ("INPUT.FORMAT", "rgb"),
        ("INPUT.MASK_FORMAT", "x"),
        ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "x"),
        ("INPUT.CROP.TYPE", "x"),
        ("INPUT.CROP.SIZE", "[-1.0, 1.0]"),
        ("MODEL.DEVICE", "x"),
        ("MODEL.DEVICE", "''"),
        ("MODEL.PIXEL_STD", "[0.0, 1.0, 1.0]"),
        ("MODEL.RESNETS.DEPTH", "42"),
        ("MODEL.RESNETS.NUM_GROUPS", "0"),
        ("MODEL.RESNETS.WIDTH_PER_GROUP", "-1"),
        ("MODEL.RESNETS.STEM_OUT_CHANNELS", "0"),
        ("MODEL.RESNETS.RES5_DILATION", "3"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", "[]"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", "[[0]]"),
        ("MODEL.RPN.IOU_THRESHOLDS", "[0.7, 0.3]"),
        ("MODEL.RPN.IOU_THRESHOLDS", "[]"),
        ("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "0"),
        ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "x"),
        ("MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "x"),
        ("DATALOADER.NUM_WORKERS", "-1"),
        ("DATALOADER.REPEAT_THRESHOLD", "-1.0"),
    ],
)
def test_a_value_out_of_range_is_named(key, value):
    with pytest.raises(UserError, match=rf"on the command line: {key} is .*: use "):
        load_config("", [key, value])


@pytest.mark.parametrize(
    "opts, message",
    [
        (["MODEL.PIXEL_STD", "[1.0]"], "have 3 and 1 values: use one for each of the 3 channels"),
        (["MODEL.PIXEL_MEAN", "[1.0]", "MODEL.PIXEL_STD", "[1.0]"], "have 1 and 1 values"),
        (
            ["INPUT.CROP.ENABLED", "True", "INPUT.CROP.SIZE", "[2.0, 2.0]"],
            "two numbers above 0 and at most 1, because CROP.TYPE is relative_range",
        ),
        (["SOLVER.REFERENCE_WORLD_SIZE", "3"], "use a multiple of SOLVER.REFERENCE_WORLD_SIZE 3"),
    ],
)
def test_values_that_do_not_fit_each_other(opts, message):
    with pytest.raises(UserError, match=message):
        load_config("", opts)


def test_a_gradient_is_clipped_by_any_norm():
    with pytest.raises(UserError, match="NORM_TYPE is 0.0: use a number > 0, or .inf"):
        load_config("", ["SOLVER.CLIP_GRADIENTS.NORM_TYPE", "0.0"])
    load_config("", ["SOLVER.CLIP_GRADIENTS.NORM_TYPE", "1e999"])


def test_a_gray_image_has_one_channel():
    load_config(
        "", ["INPUT.FORMAT", "L", "MODEL.PIXEL_MEAN", "[120.0]", "MODEL.PIXEL_STD", "[60.0]"]
    )


def _build(**changes):
    Trainer.build_model(load_config(tiny.CONFIG, tiny.opts(**changes)))


@pytest.mark.parametrize(
    "key, value, hint",
    [
        ("MODEL.META_ARCHITECTURE", "GeneralizedRCN", "did you mean GeneralizedRCNN"),
        ("MODEL.BACKBONE.NAME", "x", "known are .*build_resnet_backbone"),
        ("MODEL.ANCHOR_GENERATOR.NAME", "x", "known are DefaultAnchorGenerator"),
        ("MODEL.PROPOSAL_GENERATOR.NAME", "x", "known are "),
        ("MODEL.RPN.HEAD_NAME", "x", "known are StandardRPNHead"),
        ("MODEL.ROI_HEADS.NAME", "Res5RoiHeads", "did you mean Res5ROIHeads"),
        ("MODEL.ROI_MASK_HEAD.NAME", "x", "known are "),
    ],
)
def test_a_part_that_is_not_registered(key, value, hint):
    wanted = f"{key} is '{value}': nothing of that name is registered; {hint}"
    with pytest.raises(UserError, match=wanted):
        _build(**{key.replace(".", "__"): value})


@pytest.mark.parametrize(
    "key, value, reason",
    [
        ("MODEL.RPN.IN_FEATURES", "['p2']", "KeyError: 'p2'"),
        ("MODEL.RESNETS.OUT_FEATURES", "['res9']", "AssertionError: Available children"),
        ("MODEL.RESNETS.OUT_FEATURES", "[]", "ValueError: max"),
        ("MODEL.RESNETS.DEPTH", "18", "RES2_OUT_CHANNELS = 64 for R18/R34"),
        ("MODEL.RESNETS.NORM", "GN", "must be divisible by num_groups"),
        ("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "AssertionError"),
    ],
)
def test_what_cannot_be_built_is_one_line(key, value, reason):
    with pytest.raises(UserError, match=f"the model cannot be built from this config: .*{reason}"):
        _build(**{key.replace(".", "__"): value})


def test_a_mistake_in_a_part_of_ones_own_keeps_its_traceback():
    @BACKBONE_REGISTRY.register()
    class Mistaken(Backbone):
        def __init__(self, cfg, shape):
            super().__init__()
            raise KeyError("my own mistake")

        def forward(self, x):
            return {}

    try:
        with pytest.raises(KeyError, match="my own mistake"):
            _build(MODEL__BACKBONE__NAME="Mistaken")
    finally:
        del BACKBONE_REGISTRY._obj_map["Mistaken"]
