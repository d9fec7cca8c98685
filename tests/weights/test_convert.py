"""Converted weights give the same features in detectron2 as in their source."""

import argparse
import functools
import os
import pathlib
import pickle
import re
import resource
import signal
import subprocess
import sys

import numpy as np
import oracle
import pytest
import tiny
import torch
import torchvision
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from torch import nn

import refbn_d2.classification  # noqa: F401  (registers ImageClassifier)
from refbn_d2.config import load_config
from refbn_d2.engine import Trainer
from refbn_d2.errors import UserError
from refbn_d2.norms import EvalRefBatchNorm2d, RefBatchNorm2d, capture, convert_norm
from refbn_d2.weights.convert import convert
from refbn_d2.weights.resnet_names import detectron2_names

COCO = tiny.ROOT / "configs/COCO-InstanceSegmentation"
CLASSIFIER = str(tiny.ROOT / "configs/Quick/Base-classifier.yaml")


@pytest.fixture(scope="module")
def networks():
    """torchvision's ResNet-50 with statistics of its own, with BN and with RefBN's reference."""
    torch.manual_seed(0)
    networks = {}
    for norm in ("BN", "RefBN"):
        network = convert_norm(torchvision.models.resnet50(num_classes=7), norm)
        for m in network.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.normal_(m.bias, std=0.1)
                m.running_mean.normal_(std=0.1)
                m.running_var.uniform_(0.5, 2.0)
        with torch.no_grad(), capture(network):
            network.train()(torch.randn(4, 3, 64, 64))
        networks[norm] = network.eval()
    return networks


def _detector(options, base="mask_rcnn_R_50_C4_1x_bn.yaml"):
    opts = [str(x) for pair in options.items() for x in pair]
    cfg = load_config(str(COCO / base), [*opts, "MODEL.DEVICE", "cpu"])
    model = build_model(cfg).eval()
    Trainer.build_checkpointer(cfg, model).load(cfg.MODEL.WEIGHTS)
    return model


def _save(weights, path):
    torch.save(weights, path)
    return str(path)


@torch.no_grad()
def _check_features(model, network):
    """res2 to res4 of the backbone and res5 in the RoI head against layer1 to layer4."""
    x = torch.randn(2, 3, 96, 64)
    expected = network.maxpool(network.relu(network.bn1(network.conv1(x))))
    actual = model.backbone.stem(x)
    stages = [*(getattr(model.backbone, f"res{n}") for n in (2, 3, 4)), model.roi_heads.res5]
    for n, stage in enumerate(stages, 1):
        expected, actual = getattr(network, f"layer{n}")(expected), stage(actual)
        assert oracle.relative_error(actual, expected) < 1e-6, f"layer{n}"


@pytest.mark.parametrize("source", ["BN", "RefBN"])
@pytest.mark.parametrize("norm", [None, "FrozenBN"], ids=["live", "frozen"])
def test_a_c4_detector_gives_the_features_of_torchvisions_network(tmp_path, networks, source, norm):
    path = _save(networks[source].state_dict(), tmp_path / "resnet50.pth")
    conversion = convert(path, str(tmp_path / "backbone.pth"), norm)
    # The configuration that the tool prints is all that a detector needs.
    model = _detector(conversion.config)
    _check_features(model, networks[source])
    kind = {"BN": nn.BatchNorm2d, "RefBN": RefBatchNorm2d}[source] if norm is None else None
    layer, own = model.roi_heads.res5[2].conv3.norm, networks[source].layer4[2].bn3
    assert type(layer) is (kind or FrozenBatchNorm2d)
    if kind is RefBatchNorm2d:
        assert layer.has_reference and torch.equal(layer.ref_var, own.ref_var)


@pytest.mark.parametrize("source", ["BN", "RefBN"])
def test_there_and_back_changes_nothing(tmp_path, networks, source):
    state = networks[source].state_dict()
    files = [str(tmp_path / f"{n}.pth") for n in range(3)]
    _save(state, files[0])
    convert(files[0], files[1])
    convert(files[1], files[2], to="torchvision")
    back = torch.load(files[2], weights_only=True)
    assert set(back) == set(state) and all(torch.equal(back[k], state[k]) for k in state)


def test_a_frozen_file_comes_back_as_batchnorm_that_does_the_same(tmp_path, networks):
    files = [str(tmp_path / f"{n}.pth") for n in range(3)]
    _save(networks["RefBN"].state_dict(), files[0])
    convert(files[0], files[1], "FrozenBN")
    convert(files[1], files[2], to="torchvision")
    network = torchvision.models.resnet50(num_classes=7).eval()
    network.load_state_dict(torch.load(files[2], weights_only=True))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert oracle.relative_error(network(x), networks["RefBN"](x)) < 1e-6


# What follows needs no full network: the quick classifier's, an eighth of its width.
WIDTH = {k: v for k, v in tiny.SMALL.items() if k.startswith("MODEL.RESNETS.")}


@pytest.fixture(scope="module")
def classifier():
    opts = [str(x) for pair in WIDTH.items() for x in pair] + ["MODEL.RESNETS.NORM", "RefBN"]
    model = build_model(load_config(CLASSIFIER, [*opts, "MODEL.DEVICE", "cpu"]))
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5)
    return model


def _detector_state(norm, weights):
    cfg = load_config(tiny.CONFIG, tiny.opts(MODEL__WEIGHTS=weights, MODEL__RESNETS__NORM=norm))
    model = Trainer.build_model(cfg)
    Trainer.build_checkpointer(cfg, model).load(cfg.MODEL.WEIGHTS)
    return model.state_dict()


def test_detectors_get_every_weight_of_a_classifiers_residual_network(tmp_path, classifier):
    source = classifier.state_dict()
    path = _save({"model": source, "iteration": 3}, tmp_path / "model_final.pth")
    target = str(tmp_path / "backbone.pth")
    conversion = convert(path, target)
    assert conversion.norm == "RefBN" and conversion.left_out == []
    for norm in ("RefBN", "FrozenBN"):
        state = _detector_state(norm, target)
        residual = {k for k in state if k.startswith(("backbone.", "roi_heads.res5."))}
        of_source = {k.replace("roi_heads.res5", "backbone.res5") for k in residual}
        if norm == "RefBN":
            assert of_source == {k for k in source if k.startswith("backbone.")}
        for name in residual:
            expected = source[name.replace("roi_heads.res5", "backbone.res5")]
            assert torch.equal(state[name], expected), name


def test_a_detector_gives_its_backbone_and_conv5_and_no_head(tmp_path, classifier):
    path = _save({"model": classifier.state_dict()}, tmp_path / "model_final.pth")
    convert(path, str(tmp_path / "backbone.pth"))
    state = _detector_state("RefBN", tmp_path / "backbone.pth")
    path = _save({"model": state}, tmp_path / "detector.pth")
    conversion = convert(path, str(tmp_path / "again.pth"))
    assert conversion.left_out == [k for k in state if ".res" not in k and ".stem." not in k]
    assert conversion.left_out
    first, again = (torch.load(tmp_path / f"{n}.pth")["model"] for n in ("backbone", "again"))
    assert set(first) - set(again) == {"linear.weight", "linear.bias"}
    assert all(torch.equal(again[k], first[k]) for k in again)


def test_bn_from_refbn_leaves_the_reference_out(tmp_path, classifier):
    path = _save({"model": classifier.state_dict()}, tmp_path / "model_final.pth")
    conversion = convert(path, str(tmp_path / "bn.pth"), "BN")
    weights = torch.load(tmp_path / "bn.pth")["model"]
    assert conversion.norm == "BN" and conversion.config["MODEL.BACKBONE.FREEZE_AT"] == 0
    assert not [k for k in weights if "ref_" in k] and "res2.0.conv1.norm.running_var" in weights
    # A RefBN detector takes it; its reference is captured later.
    state = _detector_state("RefBN", tmp_path / "bn.pth")
    assert not state["backbone.stem.conv1.norm.ref_captured"]


def test_evalrefbn_keeps_its_weights_or_becomes_what_it_trained_as(tmp_path):
    torch.manual_seed(0)
    network = convert_norm(torchvision.models.resnet18(), "EvalRefBN").eval()
    norms = [m for m in network.modules() if isinstance(m, EvalRefBatchNorm2d)]
    for m in norms:
        m.running_mean.normal_(std=0.1)
        m.set_own_weight(torch.rand(()) + 1, torch.tensor(3.0))
    path = _save(network.state_dict(), tmp_path / "source.pth")

    conversion = convert(path, str(tmp_path / "same.pth"))
    assert conversion.norm == conversion.config["MODEL.RESNETS.NORM"] == "EvalRefBN"
    assert conversion.config["MODEL.BACKBONE.FREEZE_AT"] == 0 and not conversion.left_out
    same = torch.load(tmp_path / "same.pth")["model"]
    assert torch.equal(same["stem.conv1.norm.batch_deviation"], norms[0].batch_deviation)

    conversion = convert(path, str(tmp_path / "bn.pth"), "BN", to="torchvision")
    assert conversion.norm == "BN" and len(conversion.left_out) == 2 * len(norms) == 40
    plain = torchvision.models.resnet18().eval()
    plain.load_state_dict(torch.load(tmp_path / "bn.pth"), strict=True)
    x = torch.randn(2, 3, 64, 64)
    evaluated = plain(x)
    assert not torch.allclose(network(x), evaluated)
    assert torch.equal(convert_norm(network, "BN")(x), evaluated)

    assert convert(path, str(tmp_path / "frozen.pth"), "FrozenBN").norm == "FrozenBN"
    convert(str(tmp_path / "bn.pth"), str(tmp_path / "frozen_bn.pth"), "FrozenBN")
    a, b = (torch.load(tmp_path / f"{n}.pth")["model"] for n in ("frozen", "frozen_bn"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_convolutions_bias_of_zero_changes_nothing(tmp_path, classifier):
    weights = {**classifier.state_dict(), "backbone.res2.0.conv1.bias": torch.zeros(4)}
    convert(_save({"model": weights}, tmp_path / "source.pth"), str(tmp_path / "out.pth"))


def test_the_config_of_the_training_is_handed_on(tmp_path, classifier):
    path = _save({"model": classifier.state_dict()}, tmp_path / "model_final.pth")
    conversion = convert(path, str(tmp_path / "a.pth"))
    assert "INPUT.FORMAT" not in conversion.config  # nothing says
    opts = ["MODEL.PIXEL_MEAN", "[1.0, 2.0, 3.0]", "INPUT.FORMAT", "RGB"]
    (tmp_path / "config.yaml").write_text(load_config(CLASSIFIER, opts).dump())
    config = convert(path, str(tmp_path / "a.pth")).config
    assert config["MODEL.PIXEL_MEAN"] == [1.0, 2.0, 3.0] and config["INPUT.FORMAT"] == "RGB"
    assert config["MODEL.RESNETS.STRIDE_IN_1X1"] is True
    assert config["MODEL.RESNETS.WIDTH_PER_GROUP"] == WIDTH["MODEL.RESNETS.WIDTH_PER_GROUP"]


def test_a_classifier_of_torchvisions_network_has_its_strides(tmp_path, networks):
    weights = {f"network.{k}": v for k, v in networks["BN"].state_dict().items()}
    (tmp_path / "config.yaml").write_text(load_config(CLASSIFIER).dump())
    path = _save({"model": weights}, tmp_path / "model_final.pth")
    config = convert(path, str(tmp_path / "a.pth")).config
    assert config["MODEL.RESNETS.STRIDE_IN_1X1"] is False and config["INPUT.FORMAT"] == "RGB"
    assert config["MODEL.PIXEL_MEAN"] == [60.0] * 3 and config["MODEL.RESNETS.DEPTH"] == 50


def _caffe2(name):
    """The name of a detectron2 weight in the files of Detectron and of detectron2's own zoo."""
    name = name.replace("stem.conv1.norm.", "res_conv1_bn_").replace("stem.conv1", "conv1")
    for ours, theirs in zip(("shortcut", "conv1", "conv2", "conv3"), ("1", "2a", "2b", "2c")):
        name = re.sub(rf"(res\d\.\d+)\.{ours}\.", rf"\1.branch{theirs}.", name)
    name = name.replace(".norm.", "_bn_")
    for ours, theirs in (("_bn_weight", "_bn_s"), ("_bn_bias", "_bn_b"), (".weight", "_w")):
        name = name.replace(ours, theirs)
    for ours, theirs in (("running_mean", "rm"), ("running_var", "riv")):
        name = name.replace(ours, theirs)
    return name.replace(".", "_")


@pytest.mark.parametrize("author", ["Caffe2", None])
def test_a_model_zoo_file_of_caffe2s_names_loads(tmp_path, classifier, author):
    path = _save({"model": classifier.state_dict()}, tmp_path / "model_final.pth")
    convert(path, str(tmp_path / "bn.pth"), "BN")
    expected = torch.load(tmp_path / "bn.pth")["model"]
    expected = {k: v for k, v in expected.items() if "num_batches" not in k and "linear" not in k}
    content = {_caffe2(k): v.numpy() for k, v in expected.items()}
    assert "res2_0_branch2a_w" in content and "res_conv1_bn_riv" in content
    if author:
        content = {"model": content, "__author__": author}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(content, protocol=2))
    assert convert(str(tmp_path / "R-50.pkl"), str(tmp_path / "zoo.pth")).norm == "BN"
    actual = torch.load(tmp_path / "zoo.pth")["model"]
    assert set(actual) == set(expected)
    assert all(torch.equal(actual[k], expected[k]) for k in expected)


def _pretraining(weights):
    """Checkpoints as public pretraining leaves them -> what is left out of each, and what taken."""
    body = {k: v for k, v in weights.items() if not k.startswith("fc.")}

    def at(prefix):
        return {prefix + k: v for k, v in body.items()}

    junk = torch.randn(3, 3)
    args = argparse.Namespace(lr=0.1, arch="resnet50", output=pathlib.PurePosixPath("out"))
    best = np.float64(67.5)
    return {
        "MoCo v2": (
            {
                "epoch": 200,
                "arch": "resnet50",
                "state_dict": {
                    **at("module.encoder_q."),
                    "module.encoder_q.fc.0.weight": junk,
                    "module.encoder_q.fc.2.bias": junk[0],
                    **{k: v + 1 for k, v in at("module.encoder_k.").items()},
                    "module.queue": junk,
                },
                "optimizer": {"state": {}, "param_groups": [{"lr": 0.03}]},
            },
            ["module.encoder_q.fc.0.weight", "module.encoder_k.conv1.weight", "module.queue"],
            "its 'state_dict'",
        ),
        "SwAV": (
            {
                **at("module."),
                "module.projection_head.0.weight": junk,
                "module.prototypes.weight": junk,
            },
            ["module.projection_head.0.weight"],
            "by name",
        ),
        "DINO": (
            {
                "student": {k: v + 1 for k, v in at("module.backbone.").items()},
                "teacher": {**at("backbone."), "head.mlp.0.weight": junk},
                "args": args,
                "epoch": np.int64(800),
            },
            ["head.mlp.0.weight"],
            "its 'teacher', not 'student'",
        ),
        "torchvision's reference script": (
            {
                "model": at(""),
                "model_ema": {"n_averaged": torch.tensor(7), **at("module.")},
                "optimizer": {},
                "args": args,
                "best": best,
            },
            [],
            "its 'model', not 'model_ema'",
        ),
        "timm's": (
            {
                "state_dict": {**at(""), "fc.0.weight": junk},
                "state_dict_ema": at(""),
                "metric": best,
            },
            ["fc.0.weight"],
            "its 'state_dict', not 'state_dict_ema'",
        ),
    }


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("case", _pretraining({}))
def test_heads_of_public_pretraining_are_left_out(tmp_path, classifier, case, legacy):
    path = _save({"model": classifier.state_dict()}, tmp_path / "ours.pth")
    convert(path, str(tmp_path / "theirs.pth"), "BN", to="torchvision")
    weights = torch.load(tmp_path / "theirs.pth", weights_only=True)
    content, left_out, taken = _pretraining(weights)[case]
    torch.save(content, tmp_path / "public.pth", _use_new_zipfile_serialization=not legacy)
    conversion = convert(str(tmp_path / "public.pth"), str(tmp_path / "out.pth"))
    assert set(left_out) <= set(conversion.left_out) and taken in conversion.taken
    converted = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    expected = {detectron2_names(weights)[k]: v for k, v in weights.items() if k[:3] != "fc."}
    assert set(converted) == set(expected)
    assert all(torch.equal(converted[k], v) for k, v in expected.items())
    # A detector's checkpointer reads such a file, too, and says what to do with it.
    cfg = load_config(tiny.CONFIG, tiny.opts())
    checkpointer = Trainer.build_checkpointer(cfg, Trainer.build_model(cfg))
    with pytest.raises(UserError, match="public.pth.*torchvision.*refbn-d2 convert"):
        checkpointer.load(str(tmp_path / "public.pth"))


def test_another_state_dict_can_be_asked_for(tmp_path, classifier):
    plain = {k: v for k, v in classifier.state_dict().items() if k.startswith("backbone.")}
    average = {k: v + 1 for k, v in plain.items()}
    path = _save({"model": plain, "model_ema": average}, tmp_path / "both.pth")
    for key, expected in (("", plain), ("model", plain), ("model_ema", average)):
        convert(path, str(tmp_path / "out.pth"), key=key)
        written = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
        assert all(torch.equal(written[k[len("backbone.") :]], v) for k, v in expected.items())
    with pytest.raises(UserError, match="both.pth: has no weights at 'ema': it has model, model_e"):
        convert(path, str(tmp_path / "out.pth"), key="ema")


class _Evil:
    def __init__(self, path):
        self._path = str(path)

    def __reduce__(self):
        return os.mkdir, (self._path,)


@pytest.mark.parametrize("name", ["evil.pkl", "evil.pth", "old.pth"])
def test_code_in_a_file_does_not_run(tmp_path, name):
    content = {"model": {"layer1.0.conv1.weight": _Evil(tmp_path / "made")}}
    path = tmp_path / name
    if name == "evil.pth":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(UserError, match=f"{name}: cannot be read as weights"):
        convert(str(path), str(tmp_path / "out.pth"))
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]


def _without(key):
    return lambda w: {k: v for k, v in w.items() if not k.startswith(key)}


def _with(layer, value):
    return lambda w: {**w, f"backbone.{layer}.weight": value}


@pytest.mark.parametrize(
    "change, norm, message",
    [
        (_without("backbone.res5"), None, r"no ResNet of \[3, 4, 6, 0\] blocks"),
        (_without("backbone.res3.2.conv2.norm.bias"), None, "it has no res3.2.conv2.norm.bias"),
        (_without("backbone.stem"), None, "it has no stem.conv1.weight"),
        (_without("backbone"), None, "no ResNet in it"),
        (lambda w: {**w, "backbone.res2.0.se.weight": torch.ones(1)}, None, "res2.0.se.weight"),
        (lambda w: {**w, "backbone.stem.conv1.bias": torch.ones(4)}, None, "stem.conv1.bias"),
        (lambda w: {**w, "backbone.res4.1.conv1.weight": torch.ones(3)}, None, r"of shape \(3,\)"),
        (lambda w: {k: v for k, v in w.items() if ".r" not in k[12:]}, "FrozenBN", "cannot become"),
        (lambda w: {}, None, "no ResNet in it"),
        (lambda w: {**w, 5: torch.ones(1)}, None, "has the name 5 among its weights"),
        (_with("stem.conv1", torch.ones(())), None, r"stem.conv1.weight is of shape \(\), no conv"),
        (_with("stem.conv1", torch.ones(64)), None, r"stem.conv1.weight is of shape \(64,\), no"),
        (_with("stem.conv1", torch.ones(0, 3, 7, 7)), None, r"of shape \(0, 3, 7, 7\), no conv"),
        (
            _with("res2.0.conv2", torch.ones(64)),
            None,
            r"res2.0.conv2.weight is of shape \(64,\), no",
        ),
        (
            _with("res2.0.conv2", torch.ones(64, 0, 3, 3)),
            None,
            r"of shape \(64, 0, 3, 3\), no conv",
        ),
        (_with("res2.0.conv2", torch.ones(2, 64, 3, 3)), None, "builds no such ResNet"),
        (lambda w: {k: v.to("meta") for k, v in w.items()}, None, "but no values .*meta device"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_one_line(
    tmp_path, classifier, change, norm, message
):
    path = _save({"model": change(classifier.state_dict())}, tmp_path / "source.pth")
    with pytest.raises(UserError, match=message) as e:
        convert(path, str(tmp_path / "out.pth"), norm)
    assert "source.pth" in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "out.pth").exists()


def test_what_is_frozen_cannot_become_live(tmp_path, classifier):
    path = _save({"model": classifier.state_dict()}, tmp_path / "model_final.pth")
    frozen = str(tmp_path / "frozen.pth")
    assert convert(path, frozen, "FrozenBN").norm == "FrozenBN"
    assert convert(frozen, str(tmp_path / "again.pth")).norm == "FrozenBN"
    with pytest.raises(UserError, match="folded into affine maps and cannot become RefBN"):
        convert(frozen, str(tmp_path / "live.pth"), "RefBN")


def test_a_damaged_or_missing_file_is_named(tmp_path, classifier):
    path = _save({"model": classifier.state_dict()}, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:1000])
    other = _save(["a list"], tmp_path / "list.pth")
    for name, message in (
        (path, "cannot be read as weights"),
        (str(tmp_path / "none.pth"), "cannot be read as weights: .*No such file"),
        (other, "holds a list"),
    ):
        with pytest.raises(UserError, match=f"{name}: {message}"):
            convert(name, str(tmp_path / "out.pth"))


def test_a_safetensors_file_of_timms(tmp_path, classifier):
    torch_format = pytest.importorskip("safetensors.torch", reason="timm's format; optional")
    weights = {k: v for k, v in classifier.state_dict().items() if k.startswith("backbone.")}
    torch_format.save_file(weights, tmp_path / "model.safetensors")
    convert(str(tmp_path / "model.safetensors"), str(tmp_path / "out.pth"))
    converted = torch.load(tmp_path / "out.pth")["model"]
    assert len(converted) == len(weights)
    assert all(torch.equal(converted[k[len("backbone.") :]], v) for k, v in weights.items())


def test_without_its_package_a_safetensors_file_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match="model.safetensors.*pip install safetensors"):
        convert(str(tmp_path / "model.safetensors"), str(tmp_path / "out.pth"))


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path, classifier):
    path = _save({"model": classifier.state_dict()}, tmp_path / "model_final.pth")
    (tmp_path / "backbone.pth").write_text("the file that was there")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        # Writing beyond it fails as it does on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        with pytest.raises(UserError, match="backbone.pth cannot be written"):
            convert(path, str(tmp_path / "backbone.pth"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "backbone.pth").read_text() == "the file that was there"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["backbone.pth", "model_final.pth"]


def test_the_command_prints_what_it_matched_and_the_config(tmp_path, classifier):
    path = _save({"model": classifier.state_dict()}, tmp_path / "model_final.pth")
    command = [sys.executable, str(tiny.ROOT / "tools/convert_backbone.py"), path]
    run = functools.partial(subprocess.run, capture_output=True, text=True, env=tiny.environment())
    done = run([*command, str(tmp_path / "backbone.pth"), "--frozen"])
    assert done.returncode == 0, done.stderr
    assert "backbone.res5.0.shortcut.weight" in done.stdout and "norm: FrozenBN" in done.stdout
    text = done.stdout.split("config:\n")[1]
    (tmp_path / "detector.yaml").write_text(f"_BASE_: {tiny.CONFIG}\n{text}")
    cfg = load_config(str(tmp_path / "detector.yaml"))
    assert cfg.MODEL.RESNETS.NORM == "FrozenBN" and cfg.MODEL.RESNETS.STEM_OUT_CHANNELS == 4
    failed = run([*command, str(tmp_path / "x.pth"), "--frozen", "--norm", "BN"])
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("error: --frozen with --norm BN")
    assert len(failed.stderr.splitlines()) == 1
