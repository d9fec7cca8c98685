"""The training command: each mistake gives one line that names it, and no data are lost."""

import json
import subprocess
import sys

import pytest
import tiny
import torch

TOOL = str(tiny.ROOT / "tools/train_net.py")
ARGS = ["--config-file", tiny.CONFIG]


def _snapshot(folder):
    """All files but the log and their bytes."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != "log.txt")
    return {p.name: p.read_bytes() for p in files}


def _assert_one_line(result, *expected):
    assert result.status == 1
    lines = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.err
    assert all(e in lines[0] for e in expected), lines[0]
    assert "Traceback" not in result.out + result.err


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"MODEL__RESNETS__NORM": "RefBm"}, ["'RefBm'", "known are BN", "RefBN"]),
        ({"MODEL__REFBN__PSEUDO_COUNT": "-1.0"}, ["MODEL.REFBN.PSEUDO_COUNT", "-1.0", ">= 0"]),
        ({"MODEL__REFBN__REFERENCE__SEED": "-1"}, ["MODEL.REFBN.REFERENCE.SEED", "-1", ">= 0"]),
        ({"MODEL__REFBN__REFERENCE__REFRESH_PERIOD": "-5"}, ["REFRESH_PERIOD", "-5"]),
        ({"MODEL__REFBN__PSEUDO_CUONT": "1.0"}, ["PSEUDO_CUONT", "mean MODEL.REFBN.PSEUDO_COUNT"]),
        ({"SOLVER__CHECKPOINT_MAX_TO_KEEP": "-1"}, ["SOLVER.CHECKPOINT_MAX_TO_KEEP", "-1", ">= 0"]),
        ({"MODEL__WEIGHTS": "no/such.pth"}, ["no/such.pth", "MODEL.WEIGHTS"]),
        ({"DATASETS__TRAIN": "('digits',)"}, ["unknown data set 'digits'", "DATASETS.TRAIN"]),
        ({"MODEL__REFBN__REFERENCE__NUM_IMAGES": "99"}, ["99 images", "NUM_IMAGES"]),
    ],
)
def test_a_mistake_in_the_config(tiny_data, train_net, tmp_path, changes, expected):
    result = train_net(*ARGS, *tiny.opts(OUTPUT_DIR=tmp_path, **changes))
    _assert_one_line(result, *expected)
    assert not list(tmp_path.glob("*.pth"))


@pytest.mark.parametrize(
    "content, expected",
    [
        (None, "does not exist"),
        ("{", "not JSON"),
        ("{}", "no COCO ground truth, it has no list of images"),
        ("[1, 2]", "no COCO ground truth, but a list"),
        (
            '{"images": [{"id": 1}], "annotations": [], "categories": []}',
            "image 1 has no height",
        ),
    ],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_bad_data_set(tmp_path, train_net, content, expected, split):
    tiny.register(tiny.write(tmp_path / "data"), "bad")
    path = tmp_path / "data" / "coco" / "annotations" / f"instances_{split}2017.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    sets = {f"DATASETS__{'TRAIN' if s == 'train' else 'TEST'}": f"('bad_{s}',)" for s in [split]}
    extra = ["--eval-only"] if split == "val" else []
    result = train_net(*ARGS, *extra, *tiny.opts(OUTPUT_DIR=tmp_path / "out", **sets))
    _assert_one_line(result, path.name, expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_image_is_named(tmp_path, train_net, workers):
    folder = tiny.write(tmp_path / "data")
    tiny.register(folder, "cut")
    for image in sorted((folder / "coco" / "train2017").iterdir()):
        image.write_bytes(image.read_bytes()[:400])
    options = tiny.opts(
        OUTPUT_DIR=tmp_path,
        DATASETS__TRAIN="('cut_train',)",
        DATASETS__TEST="('cut_val',)",
        DATALOADER__NUM_WORKERS=workers,
        MODEL__RESNETS__NORM="BN",  # or the reference batch meets it first
    )
    result = train_net(*ARGS, *options)
    _assert_one_line(result, "train2017/0000000000", ".jpg cannot be read")


def test_resume_with_another_norm_touches_nothing(tiny_data, train_net, tmp_path):
    first = train_net(*ARGS, *tiny.opts(OUTPUT_DIR=tmp_path, DATASETS__TEST="()"))
    assert first.status == 0, first.err
    before = _snapshot(tmp_path)
    assert {"config.yaml", "model_final.pth", "last_checkpoint", "reference.json"} <= set(before)
    options = tiny.opts(OUTPUT_DIR=tmp_path, MODEL__RESNETS__NORM="BN", SOLVER__MAX_ITER=3)
    result = train_net(*ARGS, "--resume", *options)
    _assert_one_line(result, str(tmp_path), "NORM 'RefBN', not 'BN'", "OUTPUT_DIR")
    assert _snapshot(tmp_path) == before


def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(tiny_data, train_net, tmp_path):
    changes = {"SOLVER__BASE_LR": "1e20", "SOLVER__CHECKPOINT_PERIOD": 1, "SOLVER__MAX_ITER": 9}
    result = train_net(*ARGS, *tiny.opts(OUTPUT_DIR=tmp_path, **changes))
    last = tmp_path / (tmp_path / "last_checkpoint").read_text()
    _assert_one_line(result, "training diverged", f"last good checkpoint is {last}", "BASE_LR")
    weights = torch.load(last, weights_only=True)["model"]
    assert all(value.isfinite().all() for value in weights.values())
    assert not (tmp_path / "inference").exists()


def test_resuming_a_run_of_an_earlier_version(tiny_data, train_net, tmp_path):
    """Its checkpoint has fewer things, and the kill came while its config was written."""
    options = tiny.opts(OUTPUT_DIR=tmp_path, DATASETS__TEST="()")
    assert train_net(*ARGS, *options).status == 0
    path = tmp_path / "model_final.pth"
    content = torch.load(path, weights_only=True)
    del content["trainer"]["hooks"]["ExactResume"]["scalars"]
    torch.save(content, path)
    config = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(config[: config.index("[") + 1])
    result = train_net(*ARGS, "--resume", *options, "SOLVER.MAX_ITER", "3")
    assert result.status == 0, result.err
    assert "Starting training from iteration 2" in result.out
    lines = (tmp_path / "metrics.json").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [1, 2]


def test_the_newest_checkpoints_are_kept(tiny_data, train_net, tmp_path):
    changes = {"SOLVER__CHECKPOINT_MAX_TO_KEEP": 2, "SOLVER__CHECKPOINT_PERIOD": 1}
    options = tiny.opts(OUTPUT_DIR=tmp_path, DATASETS__TEST="()", **changes)
    for iterations in (4, 6):  # the first run's count, too
        assert train_net(*ARGS, "--resume", *options, "SOLVER.MAX_ITER", iterations).status == 0
        expected = [f"model_{n:07d}.pth" for n in (iterations - 2, iterations - 1)]
        assert sorted(p.name for p in tmp_path.glob("*.pth")) == [*expected, "model_final.pth"]


def test_the_real_command_line(tmp_path):
    """Once as a process: exit status, standard error, and no trace of an output."""

    def run(*options):
        command = [sys.executable, "-W", "ignore", TOOL, "--num-gpus", "0", *ARGS, *options]
        return subprocess.run(
            command, env=tiny.environment(), cwd=tmp_path, capture_output=True, text=True
        )

    misspelt = run("MODEL.REFBN.PSEUDOCOUNT", "2.0")
    unknown = run("MODEL.DEVICE", "cpu", "MODEL.RESNETS.NORM", "Reference")
    assert misspelt.returncode == unknown.returncode == 1
    assert "did you mean MODEL.REFBN.PSEUDO_COUNT?" in misspelt.stderr
    assert "unknown norm 'Reference'" in unknown.stderr
    assert "Traceback" not in misspelt.stderr + unknown.stderr + unknown.stdout
    assert not list(tmp_path.rglob("*.pth"))


def test_full_size_on_real_images(real_data, tmp_path):
    """Two steps, an evaluation, and one more step after --resume, through the built-in names."""
    tiny.cut_coco(real_data / "coco", tmp_path / "data/coco", train=20, val=2)
    output = tmp_path / "output"
    config = tiny.ROOT / "configs/COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x_refbn.yaml"
    options = {
        "MODEL.DEVICE": "cpu",
        "MODEL.WEIGHTS": "",
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 8,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 10,
        "INPUT.MIN_SIZE_TRAIN": "(128,)",
        "INPUT.MIN_SIZE_TEST": 128,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.BASE_LR": 0.0001,
        "DATALOADER.NUM_WORKERS": 0,
        "OUTPUT_DIR": output,
    }
    flat = [str(x) for pair in options.items() for x in pair]

    def run(*more):
        command = [sys.executable, "-W", "ignore", TOOL, "--num-gpus", "0", "--config-file"]
        process = subprocess.run(
            [*command, str(config), *more],
            env=tiny.environment(DETECTRON2_DATASETS=str(tmp_path / "data")),
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr[-2000:]
        return process.stdout

    assert "copypaste: Task: segm" in run(*flat, "SOLVER.MAX_ITER", "2")
    record = (output / "reference.json").read_bytes()
    first = torch.load(output / "model_final.pth", weights_only=True)["model"]
    log = run("--resume", *flat, "SOLVER.MAX_ITER", "3")
    assert "Starting training from iteration 2" in log
    second = torch.load(output / "model_final.pth", weights_only=True)["model"]
    references = [n for n in first if ".ref_" in n]
    assert len(json.loads(record)["layers"]) == 53 and len(references) >= 3 * 53
    assert all(torch.equal(first[n], second[n]) for n in references)
    assert (output / "reference.json").read_bytes() == record
    assert not torch.equal(
        first["backbone.stem.conv1.weight"], second["backbone.stem.conv1.weight"]
    )
