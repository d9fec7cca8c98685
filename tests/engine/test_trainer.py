"""Trainer on a tiny data set: what it captures, records, restores and refuses."""

import copy
import json
import math
import sys
from argparse import Namespace
from types import ModuleType

import pytest
import tiny
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import defaults
from detectron2.evaluation import COCOPanopticEvaluator, LVISEvaluator, SemSegEvaluator
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from refbn_d2 import capture_reference
from refbn_d2.config import load_config
from refbn_d2.data.grouped_sampler import image_groups
from refbn_d2.engine import Trainer
from refbn_d2.engine.hooks import EvalHook, ExactResume, ReferenceHook
from refbn_d2.engine.run_folder import run_folder
from refbn_d2.errors import UserError
from refbn_d2.statistics.reference import reference_layers


def _config(**changes):
    return load_config(tiny.CONFIG, tiny.opts(**changes))


def _trainer(output, **changes) -> Trainer:
    torch.manual_seed(0)  # the same initial weights each time
    return Trainer(_config(OUTPUT_DIR=output, **changes))


def _references(model):
    return {
        name: (m.ref_mean.clone(), m.ref_var.clone()) for name, m in reference_layers(model).items()
    }


def _same(a, b) -> bool:
    return all(torch.equal(x, y) for n in a for x, y in zip(a[n], b[n]))


def _ids(batch):
    return [d["image_id"] for d in batch]


def test_train_then_evaluate_by_command(tiny_data, train_net, tmp_path):
    """--eval-only finds the numbers that the end of training printed, from the checkpoint alone."""
    args = ["--config-file", tiny.CONFIG]
    options = tiny.opts(OUTPUT_DIR=tmp_path, MODEL__REFBN__PSEUDO_COUNT=2.0)
    result = train_net(*args, *options)
    assert result.status == 0, result.err
    predictions = tmp_path / "inference" / "coco_instances_results.json"
    expected = json.loads(predictions.read_text())
    predictions.unlink()
    options += ["MODEL.WEIGHTS", tmp_path / "model_final.pth"]
    result = train_net(*args, "--eval-only", *options)
    assert result.status == 0, result.err
    assert json.loads(predictions.read_text()) == expected

    record = json.loads((tmp_path / "reference.json").read_text())
    weights = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    assert record["m"] == len(record["image_ids"]) == 2 and record["seed"] == 0
    assert set(record["image_ids"]) <= set(range(1, 13))
    layers = {n[: -len(".ref_mean")] for n in weights if n.endswith(".ref_mean")}
    assert set(record["layers"]) == layers and len(layers) == 53
    for name, layer in record["layers"].items():
        assert layer["count"] > 0
        assert math.isclose(layer["mean"], weights[f"{name}.ref_mean"].mean().item(), abs_tol=1e-6)
        assert math.isclose(layer["var"], weights[f"{name}.ref_var"].mean().item(), rel_tol=1e-5)


def test_pseudo_count_reaches_the_layers(tiny_data, tmp_path):
    for k in (0.0, 2.5):
        model = Trainer.build_model(_config(MODEL__REFBN__PSEUDO_COUNT=k))
        assert {m.pseudo_count for m in reference_layers(model).values()} == {k}


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_norms_without_a_reference(tiny_data, tmp_path, norm):
    trainer = _trainer(tmp_path, MODEL__RESNETS__NORM=norm, SOLVER__MAX_ITER=1)
    assert not any(isinstance(h, ReferenceHook) for h in trainer._hooks)
    trainer.train()
    assert (tmp_path / "model_final.pth").exists()
    assert not (tmp_path / "reference.json").exists()


def test_the_reference_depends_on_its_own_seed_only(tiny_data, tmp_path):
    torch.manual_seed(0)
    model = Trainer.build_model(_config())
    start = {k: v.clone() for k, v in model.state_dict().items()}

    def reference(**changes):
        model.load_state_dict(start)
        cfg = _config(**changes)
        torch.manual_seed(cfg.SEED)
        seed = cfg.MODEL.REFBN.REFERENCE.SEED
        batch = Trainer.load_reference_batch(cfg)
        capture_reference(model, batch, seed)
        return _ids(batch), _references(model)

    ids, taken = reference(SEED=1)
    again_ids, again = reference(SEED=2, DATALOADER__NUM_WORKERS=2)
    assert again_ids == ids and _same(taken, again)
    others = [reference(SEED=1, MODEL__REFBN__REFERENCE__SEED=s) for s in (1, 2, 3)]
    assert all(not _same(taken, other) for _, other in others)
    assert any(set(other_ids) != set(ids) for other_ids, _ in others)


def test_number_of_reference_images(tiny_data):
    batch = Trainer.load_reference_batch(_config(MODEL__REFBN__REFERENCE__NUM_IMAGES=4))
    assert len(batch) == len(set(_ids(batch))) == 4
    # Of one orientation, as every batch of the training loader.
    assert len({d["width"] > d["height"] for d in batch}) == 1


def test_refresh_takes_the_reference_from_the_same_images(tiny_data, tmp_path, monkeypatch):
    captured = []
    original = ReferenceHook._capture

    def spy(hook):
        original(hook)
        captured.append((hook.trainer.iter, _ids(hook._batch), _references(hook.trainer.model)))

    monkeypatch.setattr(ReferenceHook, "_capture", spy)
    changes = {"MODEL__REFBN__REFERENCE__REFRESH_PERIOD": 2, "DATASETS__TEST": ()}
    _trainer(tmp_path, SOLVER__MAX_ITER=5, **changes).train()
    assert [c[0] for c in captured] == [0, 2, 4]
    assert all(c[1] == captured[0][1] for c in captured)
    # The network has learnt in between.
    assert not _same(captured[0][2], captured[1][2]) and not _same(captured[1][2], captured[2][2])
    record = json.loads((tmp_path / "reference.json").read_text())
    assert record["image_ids"] == captured[0][1]


def test_without_refresh_training_never_changes_the_reference(tiny_data, tmp_path):
    trainer = _trainer(tmp_path, SOLVER__MAX_ITER=3, DATASETS__TEST=())
    held = []
    after = trainer._trainer.run_step

    def step():
        held.append(_references(trainer.model))
        after()

    trainer._trainer.run_step = step
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    held.append(_references(trainer.model))
    assert len(held) == 4 and all(_same(held[0], h) for h in held)
    assert any(not torch.equal(before[n], p) for n, p in trainer.model.named_parameters())


def test_only_what_was_trained_to_the_end_is_evaluated():
    """Upstream also evaluates when the last step has failed, on one process alone."""
    done = []
    for iteration in (9, 10, 11):
        hook = EvalHook(0, lambda i=iteration: done.append(i))
        hook.trainer = Namespace(iter=iteration, max_iter=10, storage=EventStorage())
        hook.after_train()
        assert hook.trainer.storage.iter == (10 if iteration in done else 0)
    assert done == [10, 11]


@pytest.mark.parametrize("written", ["", "CUD", "DATASETS:\n  TEST: [", "MODEL:\n"])
def test_a_config_that_a_kill_left_unfinished_does_not_hinder_resuming(tmp_path, written):
    (tmp_path / "config.yaml").write_text(written)
    (tmp_path / "model_0000003.pth").touch()
    with run_folder(_config(OUTPUT_DIR=tmp_path), resume=True):
        pass


def test_every_step_has_random_numbers_of_its_own(tiny_data, tmp_path):
    """They depend on the iteration and not on what earlier ones drew."""
    loader = Trainer.build_train_loader(_config(SEED=7))
    hook = ExactResume(loader)

    class AtIteration:
        start_iter = 0

    hook.trainer = AtIteration()
    drawn = []
    for iteration in (5, 6, 5):
        hook.trainer.iter = iteration
        torch.rand(3)
        hook.before_step()
        drawn.append(torch.rand(4).tolist())
    assert drawn[0] == drawn[2] != drawn[1]


def test_grouped_sampler_reaches_the_loader(tiny_data):
    """With all of a batch grouped, its images share the main category."""
    cfg = _config(
        DATALOADER__SAMPLER_TRAIN="GroupedTrainingSampler", DATALOADER__GROUPING_STRENGTH=1.0
    )
    dicts = Trainer._train_dicts(cfg)
    group = dict(zip((d["image_id"] for d in dicts), image_groups(dicts)))
    batches = [_ids(b) for b, _ in zip(Trainer.build_train_loader(cfg), range(12))]
    # 12 images in groups of odd sizes: at most one batch an epoch of 6 straddles each border.
    mixed = sum(group[a] != group[b] for a, b in batches)
    assert mixed <= 2 * (len(set(group.values())) - 1) < 12


def test_a_batch_that_cannot_be_split_is_refused(tiny_data, monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 4)
    with pytest.raises(UserError, match="IMS_PER_BATCH is 6.*multiple of the number of processes"):
        Trainer.build_train_loader(_config(SOLVER__IMS_PER_BATCH=6))


def test_a_grouped_batch_larger_than_the_data_is_refused(tiny_data):
    cfg = _config(DATALOADER__SAMPLER_TRAIN="GroupedTrainingSampler", SOLVER__IMS_PER_BATCH=64)
    with pytest.raises(UserError, match="tiny_train: a batch of 64 .* got 12: .*IMS_PER_BATCH"):
        next(iter(Trainer.build_train_loader(cfg)))


def test_more_classes_than_the_heads_have_are_refused(tiny_data, train_net, tmp_path):
    options = tiny.opts(OUTPUT_DIR=tmp_path, MODEL__ROI_HEADS__NUM_CLASSES=3)
    result = train_net("--config-file", tiny.CONFIG, *options)
    assert result.status == 1
    assert "has 80 classes, MODEL.ROI_HEADS.NUM_CLASSES is 3" in result.err.splitlines()[-1]


def test_precise_bn_recomputes_mixed_statistics(tiny_data, train_net, tmp_path):
    """TEST.PRECISE_BN at the end of training and of --eval-only on what was trained without."""
    # Untrained, the network is sure of nothing: every detection counts.
    everything = {"MODEL__ROI_HEADS__SCORE_THRESH_TEST": 0.0}
    args = ["--config-file", tiny.CONFIG]
    precise = ["TEST.PRECISE_BN.ENABLED", "True", "TEST.PRECISE_BN.NUM_ITER", "3"]
    found = []
    for name, options in (("with", precise), ("without", [])):
        options = [*tiny.opts(OUTPUT_DIR=tmp_path / name, **everything), *options]
        result = train_net(*args, *options)
        assert result.status == 0, result.err
        results = tmp_path / name / "inference" / "coco_instances_results.json"
        found.append(json.loads(results.read_text()))
    assert found[0] and found[0] != found[1]
    weights = [
        torch.load(tmp_path / name / "model_final.pth", weights_only=True)["model"]
        for name in ("with", "without")
    ]
    for key, value in weights[0].items():
        assert torch.equal(value, weights[1][key]) == ("running" not in key), key
    options = tiny.opts(OUTPUT_DIR=tmp_path / "eval", **everything)
    options += ["MODEL.WEIGHTS", tmp_path / "without/model_final.pth", *precise]
    result = train_net(*args, "--eval-only", *options)
    assert result.status == 0, result.err
    results = tmp_path / "eval" / "inference" / "coco_instances_results.json"
    assert json.loads(results.read_text()) == found[0]


def test_precise_bn_of_batchnorm_weights_takes_the_reference_of_a_training(tiny_data):
    cfg = _config(MODEL__RESNETS__NORM="RefBN")
    model = Trainer.build_model(cfg)
    weights = Trainer.build_model(_config(MODEL__RESNETS__NORM="BN"))
    model.load_state_dict(weights.state_dict(), strict=False)
    expected = copy.deepcopy(model)
    capture_reference(expected, Trainer.load_reference_batch(cfg), cfg.MODEL.REFBN.REFERENCE.SEED)
    cfg.TEST.PRECISE_BN.NUM_ITER = 2
    for m in (model, expected):
        Trainer.recompute_statistics(cfg, m)
    state = expected.state_dict()
    assert state["backbone.stem.conv1.norm.ref_captured"]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_results_of_two_data_sets_do_not_replace_each_other(tiny_data, tmp_path):
    names = {("tiny_val",): "inference", ("tiny_val", "tiny_train"): "inference/tiny_val"}
    for sets, folder in names.items():
        cfg = _config(OUTPUT_DIR=tmp_path, DATASETS__TEST=sets)
        evaluator = Trainer.build_evaluator(cfg, "tiny_val")
        assert evaluator._output_dir == str(tmp_path / folder)
        assert Trainer.build_evaluator(cfg, "tiny_val", "own")._output_dir == "own"


def _semantic(folder):
    return SemSegEvaluator("interrupted", distributed=False, output_dir=folder)


def _panoptic(folder):
    return COCOPanopticEvaluator("interrupted", folder)


def _lvis(folder):
    evaluator = LVISEvaluator("interrupted", distributed=False, output_dir=folder)
    evaluator._predictions = [{"instances": []}]  # it writes nothing without any
    return evaluator


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """Registers a data set with all that the evaluators of upstream read of it."""
    ground_truth = tmp_path / "ground_truth.json"
    ground_truth.write_text("{}")
    fake = ModuleType("lvis")  # not installed; the test does not come to its computations
    fake.LVIS = lambda path: Namespace(get_ann_ids=lambda: [1])
    monkeypatch.setitem(sys.modules, "lvis", fake)
    DatasetCatalog.register("interrupted", lambda: [])
    MetadataCatalog.get("interrupted").set(
        json_file=str(ground_truth),
        panoptic_json=str(ground_truth),
        panoptic_root=str(tmp_path),
        thing_dataset_id_to_contiguous_id={},
        stuff_dataset_id_to_contiguous_id={},
        stuff_classes=["sky"],
        ignore_label=255,
    )
    yield
    DatasetCatalog.remove("interrupted")
    MetadataCatalog.remove("interrupted")


@pytest.mark.parametrize(
    "make, file",
    [
        (_semantic, "sem_seg_predictions.json"),
        (_panoptic, "predictions.json"),
        (_lvis, "lvis_instances_results.json"),
    ],
)
def test_an_interrupted_evaluation_keeps_the_results_before_it(
    make, file, interrupted, tmp_path, monkeypatch
):
    """Upstream's evaluators empty the file first, and then convert what they will write."""
    folder = tmp_path / "inference"
    folder.mkdir()
    (folder / file).write_text("before")
    evaluator = make(str(folder))
    if not hasattr(evaluator, "_predictions"):
        evaluator.reset()

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(json, "dumps", interrupt)
    monkeypatch.setattr(defaults, "inference_on_dataset", lambda *args: args[-1].evaluate())
    monkeypatch.setattr(Trainer, "build_test_loader", lambda *args: None)
    cfg = Namespace(DATASETS=Namespace(TEST=("interrupted",)))
    with pytest.raises(KeyboardInterrupt):
        Trainer.test(cfg, None, evaluator)
    assert (folder / file).read_text() == "before"
