"""Running a matrix: its runs; what is skipped, resumed or continued after a failure."""

import json
import subprocess
import sys

import pytest
import tiny
import yaml
from detectron2.engine import DefaultTrainer

from refbn_d2.config import load_config
from refbn_d2.errors import UserError
from refbn_d2.evaluation.runs import find_runs
from refbn_d2.experiments.matrix import check_seeds, load_matrix
from refbn_d2.experiments.training import Training
from refbn_d2.registry import known_norms

QUICK = tiny.ROOT / "configs/Quick"
DETECTOR = str(QUICK / "Base-mask_rcnn_R_50_C4_quick.yaml")
CLASSIFIER = str(QUICK / "Base-classifier.yaml")


def _matrix(folder, **content):
    path = folder / "matrix.yaml"
    path.write_text(yaml.safe_dump({"DETECTOR": DETECTOR, "NORMS": ["BN", "RefBN"], **content}))
    return str(path)


def test_cells_are_the_product_of_the_axes(tmp_path):
    specs = load_matrix(
        _matrix(tmp_path, SEEDS=[1, 2], IMS_PER_BATCH=[2, 4, 8], GROUPING_STRENGTH=[0.0, 1.0])
    )
    axes = {(c.norm, c.seed, c.ims_per_batch, c.grouping) for c in specs}
    assert len(specs) == len(axes) == 2 * 2 * 3 * 2
    assert len({c.folder for c in specs}) == len(specs)


@pytest.mark.parametrize("images", [1, 2, 4, 8])
def test_every_run_sees_the_same_number_of_images(tmp_path, images):
    (spec,) = load_matrix(_matrix(tmp_path, NORMS=["BN"], IMS_PER_BATCH=[images]))
    solver = load_config(spec.config, spec.detector_opts()).SOLVER
    base = load_config(spec.config).SOLVER
    assert solver.IMS_PER_BATCH == images
    assert solver.IMS_PER_BATCH * solver.MAX_ITER == base.IMS_PER_BATCH * base.MAX_ITER
    assert solver.BASE_LR / images == pytest.approx(base.BASE_LR / base.IMS_PER_BATCH)


def test_the_schedule_is_scaled_as_detectron2_scales_it(tmp_path):
    """SOLVER.REFERENCE_WORLD_SIZE is detectron2's own scaling, for another number of processes."""
    opts = ["SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 400, "SOLVER.STEPS", "(200, 320)"]
    opts += ["SOLVER.CHECKPOINT_PERIOD", 100, "SOLVER.WARMUP_ITERS", 40, "TEST.EVAL_PERIOD", 80]
    (spec,) = load_matrix(_matrix(tmp_path, NORMS=["BN"], OPTS=opts, IMS_PER_BATCH=[8]))
    found = load_config(spec.config, spec.detector_opts())
    theirs = load_config(spec.config, [*map(str, opts), "SOLVER.REFERENCE_WORLD_SIZE", "1"])
    theirs = DefaultTrainer.auto_scale_workers(theirs, num_workers=2)
    for key in (
        "IMS_PER_BATCH",
        "BASE_LR",
        "MAX_ITER",
        "WARMUP_ITERS",
        "CHECKPOINT_PERIOD",
        "STEPS",
    ):
        assert found.SOLVER[key] == theirs.SOLVER[key], key
    assert found.SOLVER.MAX_ITER == 200 and found.SOLVER.STEPS == (100, 160)
    assert found.TEST.EVAL_PERIOD == theirs.TEST.EVAL_PERIOD == 40


def test_what_is_switched_off_stays_off_and_the_rest_stays_on(tmp_path):
    opts = ["SOLVER.IMS_PER_BATCH", 4, "SOLVER.WARMUP_ITERS", 0, "TEST.EVAL_PERIOD", 1]
    opts += ["SOLVER.REFERENCE_WORLD_SIZE", 4]
    for images in (4, 16):
        (spec,) = load_matrix(_matrix(tmp_path, NORMS=["BN"], OPTS=opts, IMS_PER_BATCH=[images]))
        cfg = load_config(spec.config, spec.detector_opts())
        assert cfg.SOLVER.WARMUP_ITERS == 0 and cfg.TEST.EVAL_PERIOD == 1
        # Otherwise detectron2 would train with another batch than run.json says.
        assert cfg.SOLVER.REFERENCE_WORLD_SIZE == 0 and cfg.SOLVER.IMS_PER_BATCH == images


def test_grouping_is_the_configs_or_that_of_the_matrix(tmp_path):
    grouped = ["DATALOADER.SAMPLER_TRAIN", "GroupedTrainingSampler"]
    grouped += ["DATALOADER.GROUPING_STRENGTH", 0.9]
    for content, wanted in [
        ({"OPTS": grouped}, [0.9]),
        ({"OPTS": grouped, "GROUPING_STRENGTH": [0.0, 0.5]}, [0.0, 0.5]),
        ({"OPTS": ["DATALOADER.GROUPING_STRENGTH", 0.9]}, [0.0]),  # a sampler without groups
        ({}, [0.0]),
    ]:
        specs = load_matrix(_matrix(tmp_path, NORMS=["BN"], **content))
        assert [spec.grouping for spec in specs] == wanted
        trained = [load_config(spec.config, spec.detector_opts()).DATALOADER for spec in specs]
        assert [d.GROUPING_STRENGTH for d in trained] == wanted


def test_runs_are_compared_on_one_data_set(tmp_path):
    opts = ["DATASETS.TEST", "('coco_2017_val', 'coco_2014_val')"]
    (spec,) = load_matrix(_matrix(tmp_path, NORMS=["BN"], OPTS=opts))
    with pytest.raises(UserError, match="coco_2014_val'.: name the one data set"):
        Training(spec).record()


def test_an_entry_can_have_a_name_other_weights_and_options(tmp_path):
    entry = {
        "name": "frozen, 3 steps",
        "norm": "FrozenBN",
        "pretrained": "BN",
        "opts": ["SOLVER.MAX_ITER", 3],
    }
    (spec,) = load_matrix(_matrix(tmp_path, NORMS=[entry], CLASSIFIER=CLASSIFIER))
    cfg = load_config(spec.config, spec.detector_opts())
    assert cfg.MODEL.RESNETS.NORM == "FrozenBN" and cfg.SOLVER.MAX_ITER == 3
    assert load_config(spec.classifier, spec.classifier_opts()).MODEL.RESNETS.NORM == "BN"
    assert spec.name == "frozen, 3 steps" and " " not in str(spec.folder)


def test_a_matrix_elsewhere_names_shipped_configs(tmp_path):
    """As --config-file does; a file beside the matrix wins."""
    name = "Quick/Base-mask_rcnn_R_50_C4_quick.yaml"
    path = _matrix(tmp_path, NORMS=["BN"], DETECTOR=name, CLASSIFIER="Quick/Base-classifier.yaml")
    (spec,) = load_matrix(path)
    assert (spec.config, spec.classifier) == (DETECTOR, CLASSIFIER)
    (tmp_path / "Quick").mkdir()
    (tmp_path / name).write_text("VERSION: 2\n")
    assert load_matrix(path)[0].config == str(tmp_path / name)


@pytest.mark.parametrize(
    "content, message",
    [
        ({"NORMS": ["Nonsense"]}, "unknown norm 'Nonsense': known are BN, "),
        ({"NORMS": [{"norm": "BN", "pretrained": "GN-8"}], "CLASSIFIER": CLASSIFIER}, "'GN-8'"),
        ({"DETECTOR": "leaf_{norm}.yaml"}, "leaf_{norm}.yaml does not exist; give one config file"),
        ({"OPTS": ["MODEL.RESNETS.NORM", "BN"]}, "NORM is not an option here: use NORMS"),
        ({"NORM": ["BN"]}, "may have"),
        ({"NORMS": ["BN", "BN"]}, "same protocol, name"),
        ({"NORMS": "BN"}, "NORMS is 'BN'"),
        ({"NORMS": [{"name": "a"}]}, "use a list of norm types"),
        ({"NORMS": [{"norm": "BN", "opt": ["SEED", 1]}]}, "use a list of norm types"),
        ({"NORMS": [{"norm": "BN", "name": ""}]}, "use a list of norm types"),
        ({"SEEDS": 3}, "SEEDS is 3"),
        ({"IMS_PER_BATCH": ["two"]}, "IMS_PER_BATCH"),
        ({"OPTS": "SEED 3"}, "options are 'SEED 3'"),
        ({"CLASSIFIER_OPTS": "SEED 3"}, "options are 'SEED 3'"),
        ({"PROTOCOL": 1}, "PROTOCOL is 1"),
        ({"SEEDS": []}, "has no runs: name at least one norm"),
        ({"OPTS": ["SOLVER.IMS_PER_BATCH", 0]}, "SOLVER.IMS_PER_BATCH is 0: use at least 1"),
        ({"PROTOCOL": "é" * 128}, "'é+ is no name: use text of at most 255 bytes"),
        ({"NORMS": [{"norm": "BN", "name": "x" * 256}]}, "'x+ is no name"),
        ({"NORMS": [{"norm": "BN", "name": "\ud800"}]}, r"'\\ud800' is no name"),
    ],
)
def test_a_mistake_in_the_matrix(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        load_matrix(_matrix(tmp_path, **content))


def test_protocols_are_kept_apart(tmp_path):
    """The same norm and seed twice: in other folders, under other conditions, once pretrained."""
    frozen = tmp_path / "frozen.yaml"
    frozen.write_text(f'_BASE_: "{DETECTOR}"\nMODEL: {{BACKBONE: {{FREEZE_AT: 2}}}}\n')
    common = {"CLASSIFIER": CLASSIFIER, "CLASSIFIER_OPTS": ["SOLVER.MAX_ITER", 3]}
    parts = [
        {"PROTOCOL": "B", "DETECTOR": DETECTOR, "NORMS": ["BN"], **common},
        {
            "PROTOCOL": "A, frozen",
            "DETECTOR": "frozen.yaml",
            "NORMS": [{"name": "BN", "norm": "FrozenBN", "pretrained": "BN"}],
            **common,
        },
    ]
    path = tmp_path / "matrix.yaml"
    path.write_text(yaml.safe_dump(parts))
    b, a = load_matrix(str(path))
    assert load_config(a.config, a.detector_opts()).MODEL.BACKBONE.FREEZE_AT == 2
    assert load_config(b.config, b.detector_opts()).MODEL.BACKBONE.FREEZE_AT == 0
    assert a.folder != b.folder and str(a.folder).startswith("A_frozen/BN/")
    assert a.classifier_folder == b.classifier_folder
    assert load_config(a.classifier, a.classifier_opts()).SOLVER.MAX_ITER == 3
    parts[1]["CLASSIFIER_OPTS"] = ["SOLVER.MAX_ITER", 4]
    path.write_text(yaml.safe_dump(parts))
    with pytest.raises(UserError, match="BN is pretrained in two ways"):
        load_matrix(str(path))


def test_one_pretraining_can_serve_all_seeds(tmp_path):
    norms = ["BN", {"name": "RefBN", "norm": "RefBN", "pretrained": "BN"}]
    specs = load_matrix(
        _matrix(tmp_path, NORMS=norms, SEEDS=[1, 2, 3], CLASSIFIER=CLASSIFIER, PRETRAINING_SEED=7)
    )
    assert len({c.classifier_folder for c in specs}) == 1
    assert {load_config(c.classifier, c.classifier_opts()).SEED for c in specs} == {7}
    assert {load_config(c.config, c.detector_opts()).SEED for c in specs} == {1, 2, 3}
    own = load_matrix(_matrix(tmp_path, NORMS=norms, SEEDS=[1, 2, 3], CLASSIFIER=CLASSIFIER))
    assert [c.classifier_seed for c in own] == [c.seed for c in own]
    assert own[0].settings()["detector"] == specs[0].settings()["detector"]


@pytest.mark.parametrize("seed", [-1, 0.5, "x", [1], True])
def test_a_pretraining_seed_that_is_none(tmp_path, seed):
    with pytest.raises(UserError, match="PRETRAINING_SEED"):
        load_matrix(_matrix(tmp_path, CLASSIFIER=CLASSIFIER, PRETRAINING_SEED=seed))


def test_without_a_protocol_folders_are_what_they_were(tmp_path):
    (spec,) = load_matrix(_matrix(tmp_path, NORMS=["BN"], IMS_PER_BATCH=[2]))
    assert str(spec.folder) == "BN/batch2_grouping0/seed1"


@pytest.mark.parametrize(
    "classifier, key",
    [(CLASSIFIER, "RESNETS"), (str(tiny.ROOT / "configs/ImageNet/Base-paper.yaml"), "CLASSIFIER")],
)
def test_the_matrix_sets_the_norm_in_any_config(tmp_path, classifier, key):
    """Every known norm on one file, also one that the file does not have."""
    norms = known_norms()
    specs = load_matrix(_matrix(tmp_path, NORMS=norms, CLASSIFIER=classifier))
    assert [s.name for s in specs] == norms and len({s.folder for s in specs}) == len(norms)
    for spec, norm in zip(specs, norms):
        detector = load_config(spec.config, spec.detector_opts()).MODEL
        pretraining = load_config(spec.classifier, spec.classifier_opts()).MODEL
        assert detector.RESNETS.NORM == pretraining[key].NORM == norm


def test_seeds_of_the_command_line():
    check_seeds([0, 2**31 - 1])
    with pytest.raises(UserError, match="--seeds -1: use whole numbers from 0"):
        check_seeds([1, -1])


def test_a_missing_or_malformed_matrix(tmp_path):
    with pytest.raises(UserError, match="none.yaml"):
        load_matrix(str(tmp_path / "none.yaml"))
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(UserError, match="not plain YAML"):
        load_matrix(str(tmp_path / "bad.yaml"))


def test_run_skips_what_is_finished_and_survives_what_fails(tmp_path, tiny_data):
    """One run works, one has an impossible option; the second call has nothing left but that."""
    small = tiny.opts(DATASETS__TRAIN="('coco_2017_train',)", DATASETS__TEST="('coco_2017_val',)")
    norms = [
        {"name": "works", "norm": "RefBN"},
        {"name": "fails", "norm": "RefBN", "opts": ["DATASETS.TRAIN", "('no_such_set',)"]},
    ]
    classifier = tmp_path / "classifier.yaml"
    classifier.write_text(
        f'_BASE_: "{CLASSIFIER}"\n'
        "SOLVER: {MAX_ITER: 1, IMS_PER_BATCH: 4}\nDATASETS: {TEST: ()}\n"
    )
    width = [x for k, v in tiny.SMALL.items() if k.startswith("MODEL.RESNETS") for x in (k, v)]
    fixed = {"NORMS": norms, "CLASSIFIER": "classifier.yaml", "CLASSIFIER_OPTS": width}
    matrix = _matrix(tmp_path, OPTS=small, **fixed)
    output = tmp_path / "out"
    command = [sys.executable, str(tiny.ROOT / "tools/compare.py"), "run", matrix]
    command += ["--output", str(output), "--jobs", "2"]

    def run():
        env = tiny.environment(DETECTRON2_DATASETS=str(tiny_data))
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)

    first = run()
    assert first.returncode == 1 and "1 of 2 runs did not finish" in first.stderr
    records = {p.parent.parent.parent.name: p for p in output.rglob("run.json")}
    works = json.loads(records["works"].read_text())
    fails = json.loads(records["fails"].read_text())
    assert works["status"] == "finished" and works["norm"] == "RefBN" and works["seed"] == 1
    assert fails["status"] == "failed" and "no_such_set" in fails["error"]
    results = records["works"].parent / "inference/coco_instances_results.json"
    before = results.stat().st_mtime_ns
    assert run().returncode == 1
    assert results.stat().st_mtime_ns == before

    runs = {run.name: run.error for run in find_runs(output)}
    assert set(runs) == {"works", "fails"} and not runs["works"] and "no_such_set" in runs["fails"]

    _matrix(tmp_path, OPTS=[*small, "SOLVER.BASE_LR", 0.01], **fixed)
    third = run()
    assert third.returncode == 1 and "a run of another config" in third.stderr
    assert results.stat().st_mtime_ns == before


def test_settings_notice_a_change_in_a_base(tmp_path):
    base = tmp_path / "base.yaml"
    base.write_text("SOLVER:\n  MAX_ITER: 10\n")
    (tmp_path / "leaf.yaml").write_text('_BASE_: "base.yaml"\n')
    matrix = _matrix(tmp_path, NORMS=["BN"], DETECTOR="leaf.yaml")
    before = load_matrix(matrix)[0].settings()
    assert load_matrix(matrix)[0].settings() == before
    base.write_text("SOLVER:\n  MAX_ITER: 11\n")
    assert load_matrix(matrix)[0].settings() != before
