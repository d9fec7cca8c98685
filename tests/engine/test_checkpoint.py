"""Checkpoints are complete or skipped; weights that do not fit are refused, others load."""

import os
import resource
from unittest import mock

import numpy as np
import pytest
import tiny
import torch

from refbn_d2.config import load_config
from refbn_d2.engine import Trainer
from refbn_d2.engine.checkpoint import Checkpointer
from refbn_d2.errors import UserError
from refbn_d2.io.atomic import PARTIAL
from refbn_d2.weights import safe_pickle
from refbn_d2.weights.convert import freeze


def _model(*options, **changes):
    return Trainer.build_model(load_config(tiny.CONFIG, [*tiny.opts(**changes), *options]))


def _save(path, weights) -> str:
    torch.save({"model": weights}, path)
    return str(path)


def _load(model, path, tmp_path):
    cfg = load_config(tiny.CONFIG, tiny.opts(OUTPUT_DIR=tmp_path))
    return Trainer.build_checkpointer(cfg, model).resume_or_load(path, resume=False)


NARROW, DEEP = {"MODEL__RESNETS__STEM_OUT_CHANNELS": 8}, {"MODEL__RESNETS__DEPTH": 101}
WIDE = {"MODEL__RESNETS__WIDTH_PER_GROUP": 8}


@pytest.mark.parametrize(
    "saved, wanted",
    [({}, NARROW), (WIDE, {}), ({}, DEEP), (DEEP, {})],
    ids=["stem", "width", "R-50 into R-101", "R-101 into R-50"],
)
def test_weights_of_another_architecture(tmp_path, saved, wanted):
    path = _save(tmp_path / "other.pth", _model(**saved).state_dict())
    with pytest.raises(UserError, match="other.pth.*another architecture.*set MODEL.WEIGHTS"):
        _load(_model(**wanted), path, tmp_path)


@pytest.mark.parametrize("fused", [".norm.", ".running_"], ids=["norms", "statistics"])
def test_a_file_whose_norms_were_fused_is_refused(tmp_path, fused):
    weights = {k: v for k, v in _model().state_dict().items() if fused not in k}
    with pytest.raises(UserError, match="another architecture.*norm"):
        _load(_model(), _save(tmp_path / "fused.pth", weights), tmp_path)


@pytest.mark.parametrize("norm", ["BN", "RefBN"])
def test_a_file_whose_norms_were_folded_is_for_frozen_norms(tmp_path, norm):
    folded = freeze(_model(MODEL__RESNETS__NORM="BN").state_dict())
    path = _save(tmp_path / "folded.pth", folded)
    with pytest.raises(UserError, match="folded.pth.*folded into affine maps.*FrozenBN"):
        _load(_model(MODEL__RESNETS__NORM=norm), path, tmp_path)
    model = _model(MODEL__RESNETS__NORM="FrozenBN")
    _load(model, path, tmp_path)
    name = "backbone.res4.5.conv2.norm.weight"
    assert torch.equal(model.state_dict()[name], folded[name])


@pytest.mark.parametrize("content", [{}, {"something": torch.zeros(3)}], ids=["empty", "foreign"])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    with pytest.raises(UserError, match="another architecture"):
        _load(_model(), _save(tmp_path / "foreign.pth", content), tmp_path)


@pytest.mark.parametrize("name", ["cut.pth", "cut.pkl"])
def test_a_damaged_file_is_named(tmp_path, name):
    path = tmp_path / name
    _save(path, _model().state_dict())
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=f"{name}.*cannot be read"):
        _load(_model(), str(path), tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no/such.pth.*no such file"):
        _load(_model(), "no/such.pth", tmp_path)


def test_bn_weights_and_other_classes_load(tmp_path):
    """A norm without a reference takes it later; new classes have new heads."""
    source = _model(MODEL__RESNETS__NORM="BN")
    path = _save(tmp_path / "bn.pth", source.state_dict())
    model = _model(MODEL__ROI_HEADS__NUM_CLASSES=7)
    _load(model, path, tmp_path)
    for name in ("backbone.res4.5.conv2.weight", "roi_heads.res5.2.conv3.norm.running_var"):
        assert torch.equal(model.state_dict()[name], source.state_dict()[name])
    assert model.roi_heads.box_predictor.cls_score.out_features == 8


def _checkpointer(folder):
    model = torch.nn.Linear(50, 20)
    torch.nn.init.constant_(model.weight, 0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Checkpointer(model, str(folder), trainer=optimizer)


def _three(folder) -> Checkpointer:
    """Checkpoints of iterations 0, 1 and 2, of which each sets the bias to its number."""
    checkpointer = _checkpointer(folder)
    for n in range(3):
        torch.nn.init.constant_(checkpointer.model.bias, n)
        checkpointer.save(f"model_{n:07d}", iteration=n)
        os.utime(folder / f"model_{n:07d}.pth", (n, n))
    return checkpointer


def _resumed(folder) -> int:
    checkpointer = _checkpointer(folder)
    extra = checkpointer.resume_or_load("", resume=True)
    bias = int(checkpointer.model.bias[0])
    assert checkpointer.resumed_from == str(folder / f"model_{bias:07d}.pth")
    assert extra == {"iteration": bias}
    return bias


def _cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def _zero(path):
    """What some file systems leave of a file that was not synced."""
    path.write_bytes(bytes(path.stat().st_size))


def _flip(path):
    """One bit of the weights, which torch.load would not notice."""
    content = bytearray(path.read_bytes())
    content[content.index(bytes(4000)) + 100] ^= 1
    path.write_bytes(content)


def _weights_only(path):
    content = torch.load(path, weights_only=True)
    torch.save({"model": content["model"]}, path)


def _iteration(value):
    def damage(path):
        torch.save({**torch.load(path, weights_only=True), "iteration": value}, path)

    return damage


@pytest.mark.parametrize(
    "damage, reason",
    [
        (_cut, "not a zip file"),
        (_zero, "no pickle"),
        (lambda p: p.write_bytes(b""), "no pickle"),
        (_flip, "Bad CRC-32"),
        (lambda p: p.unlink(), "No such file"),
        (_weights_only, "it has no 'trainer'"),
        (_iteration("x"), "its iteration is 'x', not a whole number >= 0"),
        (_iteration(-5), "its iteration is -5, not"),
        (_iteration(1.5), "its iteration is 1.5, not"),
    ],
    ids=["cut", "zeros", "empty", "bit", "missing", "weights only", "text", "negative", "float"],
)
def test_resume_skips_what_is_damaged_and_says_so(tmp_path, caplog, damage, reason):
    _three(tmp_path)
    assert _resumed(tmp_path) == 2
    damage(tmp_path / "model_0000002.pth")
    assert _resumed(tmp_path) == 1
    (line,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert line.startswith(f"Skipped checkpoint {tmp_path}/model_0000002.pth") and reason in line
    damage(tmp_path / "model_0000001.pth")
    assert _resumed(tmp_path) == 0
    damage(tmp_path / "model_0000000.pth")
    with pytest.raises(UserError, match="no checkpoint .* is intact.*model_0000002.*without"):
        _resumed(tmp_path)


def test_resume_skips_what_cannot_be_read_for_a_reason_without_a_number(tmp_path, caplog):
    _three(tmp_path)

    def load(file, *args, load=safe_pickle.load_torch, **kwargs):
        if str(file).endswith("model_0000002.pth"):
            raise OSError("incomplete read")  # its strerror is None
        return load(file, *args, **kwargs)

    with mock.patch.object(safe_pickle, "load_torch", load):
        assert _resumed(tmp_path) == 1
    assert "model_0000002.pth: incomplete read" in caplog.text


def test_no_byte_of_a_checkpoint_can_change_what_is_resumed(tmp_path):
    """torch.load would accept most of these files, and return wrong weights for many."""
    checkpointer = _three(tmp_path)
    path = tmp_path / "model_0000002.pth"
    content = path.read_bytes()
    expected = {k: v.clone() for k, v in checkpointer.model.state_dict().items()}
    rng = np.random.default_rng(0)
    refused = 0
    for place in rng.choice(len(content), 300, replace=False):
        changed = bytearray(content)
        changed[place] ^= 1 << rng.integers(8)
        path.write_bytes(changed)
        for value in checkpointer.model.state_dict().values():
            value.zero_()
        damage = checkpointer._damage(str(path))
        # A file that passes the check loads unchanged. MODEL.WEIGHTS and --eval-only do not check.
        try:
            checkpointer.load(str(path), checkpointables=[])
        except UserError:
            assert damage
            refused += 1
        else:
            actual = checkpointer.model.state_dict()
            assert all(torch.equal(actual[k], expected[k]) for k in expected)
    assert refused > 200  # the rest is padding


def test_evaluation_needs_every_weight_of_the_model(tmp_path):
    """Training may start with new heads; evaluation of random ones tells nothing."""
    saved = _model(MODEL__ROI_HEADS__NUM_CLASSES=7).state_dict()
    path = _save(tmp_path / "seven.pth", saved)
    cfg = load_config(tiny.CONFIG, tiny.opts(OUTPUT_DIR=tmp_path))
    model = _model(MODEL__ROI_HEADS__NUM_CLASSES=3)
    checkpointer = Trainer.build_checkpointer(cfg, model)
    checkpointer.resume_or_load(path, resume=False)
    with pytest.raises(UserError, match=r"seven.pth.*shape \(8, \d+\) in the file and \(4, \d+\)"):
        checkpointer.load_to_evaluate(path)
    body = {k: v for k, v in model.state_dict().items() if "mask_head" not in k}
    with pytest.raises(UserError, match="body.pth.*the model has roi_heads.*, the file has not"):
        checkpointer.load_to_evaluate(_save(tmp_path / "body.pth", body))
    with pytest.raises(UserError, match="evaluation without weights.*MODEL.WEIGHTS"):
        checkpointer.load_to_evaluate("")


def test_evaluation_takes_batchnorm_for_refbn_and_a_file_with_more(tmp_path):
    saved = _model(MODEL__RESNETS__NORM="BN").state_dict()
    path = _save(tmp_path / "bn.pth", {**saved, "another_head.weight": torch.zeros(2)})
    cfg = load_config(tiny.CONFIG, tiny.opts(OUTPUT_DIR=tmp_path))
    model = _model()
    Trainer.build_checkpointer(cfg, model).load_to_evaluate(path)
    name = "backbone.res2.0.conv1.norm.running_var"
    assert torch.equal(model.state_dict()[name], saved[name])


def test_weights_in_safetensors(tmp_path):
    save = pytest.importorskip("safetensors.torch").save_file
    saved = _model().state_dict()
    save({k: v.contiguous() for k, v in saved.items()}, tmp_path / "all.safetensors")
    model = _model()
    _load(model, str(tmp_path / "all.safetensors"), tmp_path)
    assert all(torch.equal(v, saved[k]) for k, v in model.state_dict().items())


def test_the_state_dict_that_is_taken_is_said(tmp_path, caplog):
    caplog.set_level("INFO")
    saved = _model().state_dict()
    other = {k: torch.zeros_like(v) for k, v in saved.items()}
    torch.save({"state_dict": saved, "state_dict_ema": other}, tmp_path / "both.pth")
    model = _model()
    _load(model, str(tmp_path / "both.pth"), tmp_path)
    assert all(torch.equal(v, saved[k]) for k, v in model.state_dict().items())
    lines = [r.getMessage() for r in caplog.records if "both.pth, weights are" in r.getMessage()]
    assert len(lines) == 1 and "its 'state_dict', not 'state_dict_ema'" in lines[0]


def test_a_lost_mark_of_the_last_checkpoint(tmp_path):
    _three(tmp_path)
    for content in (b"", b"model_0000009.pth", b"\xff\xfe"):
        (tmp_path / "last_checkpoint").write_bytes(content)
        assert _resumed(tmp_path) == 2
    (tmp_path / "last_checkpoint").unlink()
    assert _resumed(tmp_path) == 2
    # Whoever sets the mark back wants to go back.
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    assert _resumed(tmp_path) == 1


def test_weights_that_somebody_put_there_are_no_checkpoint(tmp_path):
    _save(tmp_path / "model_start.pth", torch.nn.Linear(50, 20).state_dict())
    checkpointer = _checkpointer(tmp_path)
    assert checkpointer.resume_or_load("", resume=True) == {}
    assert not checkpointer.resumed_from


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", [1, 2], ids=["checkpoint", "mark"])
def test_killed_before_a_file_has_its_name(tmp_path, moment):
    checkpointer = _three(tmp_path)
    with mock.patch.object(os, "replace", _killed_at(moment)), pytest.raises(_Killed):
        checkpointer.save("model_0000003", iteration=3)
    assert _resumed(tmp_path) == 2
    torch.nn.init.constant_(checkpointer.model.bias, 3)
    checkpointer.save("model_0000003", iteration=3)
    assert _resumed(tmp_path) == 3


def _killed_at(moment):
    calls, replace = [], os.replace

    def replaced(*args):
        calls.append(args)
        if len(calls) == moment:
            raise _Killed
        replace(*args)

    return replaced


def test_leftovers_of_a_kill_go(tmp_path):
    _three(tmp_path)
    (tmp_path / f"model_0000003.pth{PARTIAL}").write_bytes(b"half")
    assert _resumed(tmp_path) == 2
    assert not list(tmp_path.glob("*" + PARTIAL))


def test_a_full_disk_costs_nothing_but_the_new_checkpoint(tmp_path):
    checkpointer = _three(tmp_path)
    before = sorted(os.listdir(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(UserError, match="0000003.pth cannot.*too large.*0000002.pth.*room"):
            checkpointer.save("model_0000003", iteration=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(os.listdir(tmp_path)) == before
    assert _resumed(tmp_path) == 2


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    checkpointer = _three(tmp_path)
    torch.nn.init.constant_(checkpointer.model.bias, float("nan"))
    with pytest.raises(UserError, match="diverged: bias is not finite.*last good.*0000002.pth"):
        checkpointer.save("model_0000002", iteration=2)
    assert _resumed(tmp_path) == 2


def test_earlier_checkpoints(tmp_path):
    checkpointer = _three(tmp_path)
    checkpointer.save("model_final", iteration=9)
    (tmp_path / "model_best.pth").touch()
    names = [os.path.basename(p) for p in checkpointer.earlier_checkpoints(2)]
    assert names == ["model_0000000.pth", "model_0000001.pth"]
