"""Precomputed proposals: they are read as data, and errors name invalid ones."""

import os
import pickle

import numpy as np
import pytest
import tiny
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode

from refbn_d2.config import load_config
from refbn_d2.engine import Trainer
from refbn_d2.errors import UserError


class _Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def _proposals(split):
    ids = [d["image_id"] for d in DatasetCatalog.get(f"tiny_{split}")]
    return {
        "ids": ids,
        "boxes": [np.array([[1, 2, 20 + i, 30], [0, 0, 9, 9]], np.float32) for i in ids],
        "objectness_logits": [np.array([0.5, 2.0], np.float32) for _ in ids],
        "bbox_mode": BoxMode.XYXY_ABS,
    }


@pytest.fixture
def cfg(tiny_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = tiny.opts(MODEL__LOAD_PROPOSALS=True, OUTPUT_DIR=tmp_path)
    for split in ("train", "val"):
        (tmp_path / f"{split}.pkl").write_bytes(pickle.dumps(_proposals(split), protocol=2))
    options += ["DATASETS.PROPOSAL_FILES_TRAIN", "('train.pkl',)"]
    return load_config(tiny.CONFIG, [*options, "DATASETS.PROPOSAL_FILES_TEST", "('val.pkl',)"])


def test_each_image_gets_its_boxes_best_first(cfg):
    dicts = {d["image_id"]: d for d in Trainer._train_dicts(cfg)}
    assert len(dicts) == 12
    for image, record in dicts.items():
        assert record["proposal_boxes"].tolist() == [[0, 0, 9, 9], [1, 2, 20 + image, 30]]
        assert record["proposal_objectness_logits"].tolist() == [2.0, 0.5]
    (first,) = next(iter(Trainer.build_test_loader(cfg, "tiny_val")))
    assert len(first["proposals"]) == 2


BAD = {
    "code": (lambda p: _Evil(), "asks for .*mkdir"),
    "code inside": (lambda p: {**p, "boxes": [_Evil()]}, "asks for .*mkdir"),
    "list": (lambda p: [1], "a list, not a dict"),
    "no boxes": (lambda p: {k: v for k, v in p.items() if k != "boxes"}, "no list of 'boxes'"),
    "fewer boxes": (lambda p: {**p, "boxes": p["boxes"][1:]}, "different lengths"),
    "an image less": (
        lambda p: {k: v[1:] if k != "bbox_mode" else v for k, v in p.items()},
        "1 of",
    ),
    "flat boxes": (lambda p: {**p, "boxes": [b[0] for b in p["boxes"]]}, "N x 4 boxes"),
    "lists": (lambda p: {**p, "boxes": [b.tolist() for b in p["boxes"]]}, "N x 4 boxes"),
    "a logit more": (
        lambda p: {**p, "objectness_logits": [np.zeros(3) for _ in p["ids"]]},
        "N logits",
    ),
    "not finite": (lambda p: {**p, "boxes": [b * np.nan for b in p["boxes"]]}, "not finite"),
    "no such mode": (lambda p: {**p, "bbox_mode": 77}, "77"),
}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_named_and_runs_nothing(cfg, case, split, tmp_path):
    change, message = BAD[case]
    (tmp_path / f"{split}.pkl").write_bytes(pickle.dumps(change(_proposals(split)), protocol=2))
    with pytest.raises(UserError, match=f"proposals '{split}.pkl'.*{message}"):
        if split == "train":
            Trainer.build_train_loader(cfg)
        else:
            Trainer.build_test_loader(cfg, "tiny_val")
    assert not (tmp_path / "ran").exists()


def test_a_missing_file_and_a_missing_name(cfg, tmp_path):
    (tmp_path / "train.pkl").unlink()
    with pytest.raises(UserError, match="proposals 'train.pkl' cannot be read: .*No such file"):
        Trainer.build_train_loader(cfg)
    cfg.DATASETS.PROPOSAL_FILES_TRAIN = ()
    with pytest.raises(UserError, match="PROPOSAL_FILES_TRAIN has 0 files for the 1 data sets"):
        Trainer.build_train_loader(cfg)
