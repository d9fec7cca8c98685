"""``refbn-d2 predict``: the detections equal those of an evaluation, for every kind of image."""

import functools
import json
import os
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny
import torch
from detectron2.data import DatasetCatalog
from detectron2.data.catalog import Metadata
from detectron2.structures import Boxes, Instances

from refbn_d2.commands import predict
from refbn_d2.config import load_config
from refbn_d2.engine import Trainer
from refbn_d2.engine.predictor import coco_results, draw, have_counterpart

# A random network is sure of nothing: keep what it finds.
OPTS = tiny.opts(MODEL__ROI_HEADS__SCORE_THRESH_TEST=0.001)


def write_model(folder, seed):
    """config.yaml and model_final.pth of an untrained detector, as a training run leaves them."""
    folder.mkdir(parents=True)
    cfg = load_config(tiny.CONFIG, OPTS)
    (folder / "config.yaml").write_text(cfg.dump())
    torch.manual_seed(seed)
    path = folder / "model_final.pth"
    torch.save({"model": Trainer.build_model(cfg).state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def weights(tiny_data, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "first", 1)


@pytest.fixture
def run(monkeypatch, capfd):
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["predict", *map(str, args)])
        status = 0
        try:
            predict.main()
        except SystemExit as e:
            status = e.code
        return (status, *capfd.readouterr())

    return run


def val_images(tiny_data):
    return sorted((tiny_data / "coco/val2017").iterdir())


def test_results_are_those_of_an_evaluation(weights, tiny_data, tmp_path, run, train_net):
    evaluated = train_net(
        "--eval-only", "--config-file", tiny.CONFIG, *OPTS, "MODEL.WEIGHTS", weights,
        "OUTPUT_DIR", tmp_path / "evaluated",
    )  # fmt: skip
    assert evaluated.status == 0, evaluated.err
    results = tmp_path / "evaluated/inference/coco_instances_results.json"
    expected = json.loads(results.read_text())
    status, out, err = run(
        "--weights", weights, "--output", tmp_path / "out", tiny_data / "coco/val2017"
    )
    assert status == 0, err
    found = json.loads((tmp_path / "out" / predict.RESULTS).read_text())
    assert len(expected) > 5

    def key(r):
        return r["image_id"], r["category_id"], tuple(np.round(r["bbox"], 3)), round(r["score"], 5)

    # Masks, too: both are RLE of the same pixels.
    assert sorted((*key(r), r["segmentation"]["counts"]) for r in found) == sorted(
        (*key(r), r["segmentation"]["counts"]) for r in expected
    )
    assert {p.suffix for p in (tmp_path / "out").iterdir()} == {".png", ".json"}
    assert len(list((tmp_path / "out").glob("*.png"))) == len(val_images(tiny_data))


def test_what_is_no_image_ends_with_a_line_and_the_others_are_done(
    weights, tiny_data, tmp_path, run
):
    bad = tmp_path / "bad.png"
    bad.write_text("no image")
    status, out, err = run(
        "--weights", weights, "--output", tmp_path / "out", bad, val_images(tiny_data)[0]
    )
    assert status == 1 and str(bad) in err and err.startswith("error: 1 of 2 files")
    assert len(err.strip().splitlines()) == 1
    assert (tmp_path / "out" / f"{val_images(tiny_data)[0].stem}.png").exists()


@pytest.mark.parametrize(
    "args, message",
    [
        (["missing/*.jpg"], "no such file or folder"),
        (["."], "has no images"),
    ],
)
def test_an_argument_that_names_no_image(args, message, weights, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(*args, "--weights", weights, "--output", tmp_path / "out")
    assert status == 1 and message in err and args[0] in err


def test_weights_without_a_config(weights, tiny_data, tmp_path, run):
    alone = tmp_path / "alone.pth"
    alone.write_bytes(weights.read_bytes())
    image = val_images(tiny_data)[0]
    status, _, err = run(image, "--weights", alone, "--output", tmp_path / "out")
    assert status == 1 and "--config-file" in err
    config = weights.parent / "config.yaml"
    status, _, err = run(
        image, "--weights", alone, "--config-file", config, "--output", tmp_path / "out"
    )
    assert status == 0, err


def test_two_models_side_by_side(weights, tiny_data, tmp_path, run):
    other = write_model(tmp_path / "second", 2)
    image = val_images(tiny_data)[0]
    status, _, err = run("--weights", weights, other, "--output", tmp_path / "out", image)
    assert status == 0, err
    height, width = cv2.imread(str(image)).shape[:2]
    picture = cv2.imread(str(tmp_path / "out" / f"{image.stem}.png"))
    assert picture.shape[1] / picture.shape[0] == pytest.approx(2 * width / height, rel=0.1)
    results = sorted(p.name for p in (tmp_path / "out").glob("*.json"))
    assert len(results) == 2 and "second" in results[1]


def test_each_frame_of_a_video(weights, tmp_path, run):
    path = tmp_path / "clip.avi"
    video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 5, (64, 48))
    for n in range(3):
        video.write(np.full((48, 64, 3), 60 * n, np.uint8))
    video.release()
    assert predict.count_frames(path) == 3
    status, _, err = run(path, "--weights", weights, "--output", tmp_path / "out")
    assert status == 0, err
    assert len(list((tmp_path / "out").glob("clip_*.png"))) == 3


def _cut(path):
    video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 5, (64, 48))
    for _ in range(3):
        video.write(np.zeros((48, 64, 3), np.uint8))
    video.release()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "name, write, opts, message",
    [
        ("x.png", os.mkfifo, [], "x.png: has no images"),
        ("x.mp4", os.mkfifo, [], "x.mp4: has no images"),
        ("x.avi", _cut, [], "x.avi: OpenCV cannot open this video"),
        (
            os.fsdecode(b"\xff.avi"),
            Path.touch,
            [],
            "OpenCV cannot open a file of this name: rename it",
        ),
        (
            "x.png",
            lambda p: cv2.imwrite(str(p), np.zeros((1, 3000, 3), np.uint8)),
            [],
            "x.png: an image of 1 x 3000 pixels (height x width) is too narrow",
        ),
        ("x.png", None, ["MODEL.DEVICE", "cuda"], "there is no GPU: set MODEL.DEVICE cpu"),
        ("x.png", None, ["INPUT.FORMAT", "YUV-BT.601"], "INPUT.FORMAT is YUV-BT.601: predictions"),
    ],
)
def test_what_cannot_be_predicted(
    name, write, opts, message, weights, tiny_data, tmp_path, run, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / name
    (write or functools.partial(shutil.copy, val_images(tiny_data)[0]))(path)
    status, _, err = run("--weights", weights, "--output", tmp_path / "out", path, "--opts", *opts)
    last = err.strip().splitlines()[-1]
    assert status == 1 and last.startswith("error: ") and message in last


@pytest.mark.parametrize("name", [predict.RESULTS, "000000000001.png", ""])
def test_an_output_that_cannot_be_written(name, weights, tiny_data, tmp_path, run):
    output = tmp_path / "out"
    if name:
        (output / name).mkdir(parents=True)
    else:
        output.touch()
    image = shutil.copy(val_images(tiny_data)[0], tmp_path / "000000000001.jpg")
    status, _, err = run("--weights", weights, "--output", output, image)
    assert status == 1 and f"{output / name} cannot be written" in err and "another --output" in err


@pytest.mark.parametrize("names", ["('coco_2017_val',)", "('voc_2007_val',)", "('none',)"])
def test_neither_the_data_set_nor_a_name_in_utf8_is_needed(
    names, weights, tiny_data, tmp_path, run, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    image = shutil.copy(val_images(tiny_data)[0], os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg"))
    args = ("--weights", weights, "--output", "out", image, "--opts", "DATASETS.TEST", names)
    assert run(*args)[0] == 0
    assert len(os.listdir("out")) == 2 and json.loads(
        (tmp_path / "out" / predict.RESULTS).read_text()
    )


def instances(boxes, classes):
    found = Instances((100, 100))
    found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float).view(-1, 4))
    found.pred_classes = torch.tensor(classes, dtype=torch.long)
    found.scores = torch.full((len(classes),), 0.9)
    return found


def test_a_counterpart_has_the_same_class_and_overlaps():
    a = instances([[0, 0, 10, 10], [20, 20, 40, 40], [50, 50, 60, 60]], [0, 1, 2])
    # IoU with a's boxes: 9 x 10 / 110 of the first; the second has another class; none is third's.
    b = instances([[1, 0, 11, 10], [20, 20, 40, 40]], [0, 0])
    assert have_counterpart(a, b).tolist() == [True, False, False]
    assert have_counterpart(b, a).tolist() == [True, False]
    none = instances([], [])
    assert have_counterpart(none, a).tolist() == []
    assert have_counterpart(a, none).tolist() == [False] * 3


def test_ids_of_categories_are_those_of_the_data_set():
    meta = Metadata(thing_dataset_id_to_contiguous_id={7: 0, 3: 1})
    found = coco_results(instances([[1, 2, 4, 6], [0, 0, 1, 1]], [1, 0]), 5, meta)
    assert [(r["image_id"], r["category_id"], r["bbox"]) for r in found] == [
        (5, 3, [1, 2, 3, 4]),
        (5, 7, [0, 0, 1, 1]),
    ]


@pytest.mark.parametrize("name", ["$x$_{", r"\frac", "a\nb", "<b>", "\ud800"])
def test_any_name_of_a_class_can_be_drawn(name):
    meta = Metadata(thing_classes=[name, "other"])
    image = np.zeros((40, 60, 3), np.uint8)
    picture = draw(image, {"instances": instances([[5, 5, 30, 30]], [0])}, meta)
    assert picture.shape[:2] == (400, 600) and picture.any()


def test_images_are_not_overwritten(weights, tiny_data, tmp_path, run):
    image = val_images(tiny_data)[0]
    own = tmp_path / "own.png"
    shutil.copy(image, own)
    before = own.read_bytes()
    status, out, err = run("--weights", weights, "--output", tmp_path, own)
    assert status == 1 and "has images to predict on" in err
    assert own.read_bytes() == before


def test_each_image_has_a_picture_of_its_own(weights, tiny_data, tmp_path, run):
    folder = tmp_path / "images"
    folder.mkdir()
    pixels = cv2.imread(str(val_images(tiny_data)[0]), cv2.IMREAD_GRAYSCALE)
    for name in ("a.jpg", "a.png", "a_2.png", "b.pgm"):
        assert cv2.imwrite(str(folder / name), pixels)
    status, out, err = run("--weights", weights, "--output", tmp_path / "out", folder)
    assert status == 0 and "4 pictures" in out
    found = sorted(p.stem for p in (tmp_path / "out").glob("*.png"))
    assert found == ["a", "a_2", "a_2_2", "b"]


def test_only_copies_of_a_data_sets_images_have_their_ids(weights, tiny_data, tmp_path, run):
    first, second = val_images(tiny_data)[:2]
    copy, other = tmp_path / "copy" / first.name, tmp_path / "other" / second.name
    for path, source in ((copy, first), (other, first)):  # "other" only has the name of the second
        path.parent.mkdir()
        shutil.copy(source, path)
    ids = {Path(d["file_name"]).name: d["image_id"] for d in DatasetCatalog.get("tiny_val")}
    assert run("--weights", weights, "--output", tmp_path / "out", copy, other)[0] == 0
    entries = json.loads((tmp_path / "out" / predict.RESULTS).read_text())
    found = {r["file_name"]: r["image_id"] for r in entries}
    assert found[str(copy)] == ids[first.name]
    assert found[str(other)] not in ids.values()
    # One name for two files does not tell which of them is the data set's.
    assert run("--weights", weights, "--output", tmp_path / "out", copy, first)[0] == 0
    entries = json.loads((tmp_path / "out" / predict.RESULTS).read_text())
    found = {r["file_name"]: r["image_id"] for r in entries}
    assert found[str(first)] == ids[first.name] != found[str(copy)]
