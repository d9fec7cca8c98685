"""The generated data set: reproducible, valid for pycocotools, with disjoint splits."""

import json

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from pycocotools.coco import COCO

from refbn_d2.data import quick


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Eight scenes a split in a folder of their own."""
    monkeypatch.setattr(quick, "SPLITS", {"train": (8, 1), "val": (8, 2)})
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "sets"))
    return tmp_path


def _files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.*")}


def _visible(folder):
    """Names in a folder but for the lock file, which stays."""
    return [p.name for p in folder.iterdir() if p.name != f".{quick.root().name}.lock"]


def test_generating_twice_gives_the_same_bytes(small):
    quick.generate(small / "a")
    quick.generate(small / "b")
    files = _files(small / "a")
    assert files == _files(small / "b") and len(files) == 2 * 8 + 2


def test_annotations_are_coco(small):
    quick.generate(small / "a")
    coco = COCO(str(small / "a" / "instances_train.json"))
    annotations = coco.loadAnns(coco.getAnnIds())
    assert len(coco.getCatIds()) == 10 and len(annotations) > 8
    for a in annotations:
        mask = coco.annToMask(a)
        ys, xs = np.nonzero(mask)
        x, y, w, h = a["bbox"]
        assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == (x, y, x + w, y + h)
        assert a["area"] == mask.sum() >= 60
    for image in coco.loadImgs(coco.getImgIds()):
        masks = [coco.annToMask(a) for a in coco.imgToAnns[image["id"]]]
        # What hides another digit takes its pixels.
        assert not masks or np.sum(masks, axis=0).max() == 1
        pixels = cv2.imread(str(small / "a" / "train" / image["file_name"]))
        assert pixels.shape == (image["height"], image["width"], 3)
        assert image["style"] in quick.STYLES


def test_splits_use_different_samples():
    train, val = (quick.digit_samples(s)[0] for s in ("train", "val"))
    assert len(train) + len(val) == 1797 and len(val) > 400
    assert not {s.tobytes() for s in train} & {s.tobytes() for s in val}


def test_loading_generates_and_keeps_the_style(small):
    dicts = DatasetCatalog.get("quick_digits_val")
    content = json.loads((quick.root() / "instances_val.json").read_text())
    assert [d["style"] for d in dicts] == [i["style"] for i in content["images"]]
    assert len(dicts) == 8 and "segmentation" in dicts[0]["annotations"][0]
    before = _files(quick.root())
    DatasetCatalog.get("quick_digits_val")
    assert _files(quick.root()) == before
    assert _visible(quick.root().parent) == [quick.root().name]


def test_an_interrupted_generation_leaves_nothing(small, monkeypatch):
    def interrupted(folder):
        (folder / "train").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(quick, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        DatasetCatalog.get("quick_digits_val")
    assert _visible(quick.root().parent) == []


def test_what_a_killed_generation_left_goes(small):
    root = quick.root()
    partial = root.with_name(root.name + ".partial")
    (partial / "train").mkdir(parents=True)
    (partial / "train/000001.png").write_bytes(b"half")
    quick.generate(small / "a")
    assert len(DatasetCatalog.get("quick_digits_train")) == 8
    assert _files(root) == _files(small / "a") and not partial.exists()
