"""Data sets are read once and kept in one copy; those made by a function become plain data."""

import copy
import gc
import json
import os
from collections import Counter

import numpy as np
import pytest
import tiny
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog, build
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode
from pycocotools import coco as pycoco
from pycocotools import mask as mask_util

from refbn_d2.config import load_config
from refbn_d2.data import sets
from refbn_d2.data.annotations import contents, plain_dicts
from refbn_d2.data.checks import class_names, set_num_classes
from refbn_d2.data.coco_json import read_coco
from refbn_d2.data.sets import load_test_set, load_train_set
from refbn_d2.engine import Trainer
from refbn_d2.errors import UserError

NAMES = ("made_train", "made_val")


def _config(**changes):
    return load_config(tiny.CONFIG, tiny.opts(**changes))


@pytest.fixture
def made():
    """Registers a function, or a JSON file, under one of NAMES."""

    def register(name, source, image_root="", classes=("x", "y")):
        for catalog in (DatasetCatalog, MetadataCatalog):
            if name in catalog.list():
                catalog.remove(name)
        if callable(source):
            DatasetCatalog.register(name, source)
            MetadataCatalog.get(name).set(evaluator_type="coco", thing_classes=list(classes))
        else:
            register_coco_instances(name, {}, str(source), str(image_root))

    yield register
    for name in NAMES:
        for catalog in (DatasetCatalog, MetadataCatalog):
            if name in catalog.list():
                catalog.remove(name)


def test_a_run_reads_each_file_once(tiny_data, tmp_path, monkeypatch):
    """Loader, reference, checks, two evaluations and precise statistics share what was read."""
    tiny.register(tiny_data)
    parsed = Counter()
    original = json.loads, pycoco.COCO.__init__

    def counting(text, *args, **kwargs):
        content = original[0](text, *args, **kwargs)
        if isinstance(content, dict) and "images" in content:
            parsed[len(content["images"])] += 1
        return content

    def init(self, file=None):
        parsed["by pycocotools"] += file is not None
        original[1](self, file)

    monkeypatch.setattr(json, "loads", counting)
    monkeypatch.setattr(pycoco.COCO, "__init__", init)
    for json_file in tiny_data.rglob("*.json"):
        os.utime(json_file)  # what another test has read is of no use
    output = {"OUTPUT_DIR": tmp_path, "TEST__PRECISE_BN__ENABLED": True}
    Trainer(_config(TEST__EVAL_PERIOD=1, TEST__PRECISE_BN__NUM_ITER=1, **output)).train()
    assert parsed == {12: 1, 3: 1, "by pycocotools": 0}


def test_loader_and_reference_have_one_copy(tiny_data):
    cfg = _config()
    assert load_train_set(cfg) is load_train_set(cfg)
    loader = Trainer.build_train_loader(cfg)
    assert loader._dataset is load_train_set(cfg).dicts
    assert load_test_set(cfg, "tiny_val") is load_test_set(cfg, "tiny_val")
    assert len(load_test_set(cfg, "tiny_val").dicts) == 3


def test_upstreams_loader_may_ask_the_catalog_for_its_names(made, tmp_path, tiny_data, monkeypatch):
    """As that of detectron2's main branch does, before it takes the data sets."""
    file = tmp_path / "made.json"
    file.write_text((tiny_data / "coco/annotations/instances_train2017.json").read_text())
    made("made_train", file, tiny_data / "coco/train2017")
    load = sets.get_detection_dataset_dicts

    def ask(names, *args, **kwargs):
        assert set(names).issubset(build.DatasetCatalog.keys())
        return load(names, *args, **kwargs)

    monkeypatch.setattr(sets, "get_detection_dataset_dicts", ask)
    assert len(load_train_set(_config(DATASETS__TRAIN="('made_train',)")).dicts) == 12


def test_what_was_read_for_training_is_freed(made, tmp_path, tiny_data):
    """At once, not at the next garbage collection: of COCO it is 2 GB a process."""
    file = tmp_path / "made.json"
    file.write_text((tiny_data / "coco/annotations/instances_train2017.json").read_text())
    made("made_train", file, tiny_data / "coco/train2017")
    gc.collect()
    gc.disable()
    try:
        before = sum(type(o) is pycoco.COCO for o in gc.get_objects())
        assert len(load_train_set(_config(DATASETS__TRAIN="('made_train',)")).dicts) == 12
        assert sum(type(o) is pycoco.COCO for o in gc.get_objects()) == before
    finally:
        gc.enable()


def test_a_changed_file_and_another_function_are_read_anew(made, tmp_path, tiny_data):
    content = json.loads((tiny_data / "coco/annotations/instances_train2017.json").read_text())
    file = tmp_path / "made.json"
    file.write_text(json.dumps(content))
    made("made_train", file, tiny_data / "coco/train2017")
    cfg = _config(DATASETS__TRAIN="('made_train',)")
    assert len(load_train_set(cfg).dicts) == 12
    content["images"] = content["images"][:5]
    file.write_text(json.dumps(content))
    made("made_train", file, tiny_data / "coco/train2017")
    assert len(load_train_set(cfg).dicts) == 5


def test_what_one_user_of_a_file_changes_no_other_sees(tmp_path, tiny_data):
    source = tiny_data / "coco/annotations/instances_val2017.json"
    content = json.loads(source.read_text())
    for annotation in content["annotations"]:
        annotation["keypoints"] = [1, 2, 2]
        del annotation["iscrowd"]
    file = tmp_path / "a.json"
    file.write_text(json.dumps(content))
    first = read_coco(str(file))
    for annotation in first.anns.values():
        annotation["ignore"] = 1
        annotation["keypoints"][0] += 0.5
    for annotation in read_coco(str(file)).anns.values():
        assert annotation["keypoints"] == [1, 2, 2] and "ignore" not in annotation
        assert annotation["iscrowd"] == 0  # pycocotools takes it for granted


def _dicts(folder):
    """As a careless script would make them: NumPy, tuples, no sizes, no ids."""
    mask = np.zeros((64, 80), dtype=bool)
    mask[10:30, 20:50] = True
    corners = np.array([[20, 10], [50, 10], [50, 30], [20, 30]], dtype="float32")
    runs = {"size": (64, 80), "counts": [20 * 64 + 10, 20, 64 * 80 - 20 * 64 - 30]}
    common = {"bbox": np.array([20.0, 10.0, 50.0, 30.0]), "bbox_mode": np.int64(0)}
    masks = [[corners.reshape(-1)], [tuple(corners.reshape(-1).tolist())], mask, runs]
    annotations = [
        {**common, "category_id": np.int64(1), "iscrowd": np.uint8(0), "segmentation": m}
        for m in masks
    ]
    annotations.append({**common, "bbox": (20, 10, 50, 30), "category_id": 0})
    return [{"file_name": folder / "coco/train2017/000000000001.jpg", "annotations": annotations}]


OBJECT = {"bbox": [20, 10, 50, 30], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1}


def test_a_functions_types_become_plain(tiny_data):
    (source,) = _dicts(tiny_data)
    before = copy.deepcopy(source)
    (d,) = plain_dicts([source], "set", 2)
    assert (d["height"], d["width"], d["image_id"]) == (64, 80, 0)
    for annotation in d["annotations"]:
        assert annotation["bbox"] == [20, 10, 50, 30] and type(annotation["bbox"]) is list
        assert annotation["bbox_mode"] is BoxMode.XYXY_ABS
        assert type(annotation["category_id"]) is int
    polygon, from_tuple, from_array, from_runs, _ = (
        a.get("segmentation") for a in d["annotations"]
    )
    assert polygon == from_tuple == [[20, 10, 50, 10, 50, 30, 20, 30]]
    wanted = before["annotations"][2]["segmentation"]
    assert np.array_equal(mask_util.decode(from_array), wanted)
    assert mask_util.area(from_runs) == 20
    assert np.array_equal(source["annotations"][2]["segmentation"], wanted)
    found = contents([d])
    assert found.objects == 5 and found.largest_class == 1
    assert found.without_mask == found.with_rle == [d["file_name"]]


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"image_id": [1]}, "image_id is .1., neither"),
        ({"height": "64", "width": 80}, "height and width are"),
        ({"file_name": 5}, "file_name is 5"),
        ({"file_name": "a\0.jpg"}, r"file_name is 'a\\x00.jpg', no file's name"),
        ({"annotations": [{"bbox_mode": 0, "category_id": 0}]}, "annotation 0 has no bbox$"),
        ({"annotations": [{"bbox": [1] * 4, "category_id": 0}]}, "annotation 0 has no bbox_mode"),
        ({"annotations": [{"bbox": [1] * 4, "bbox_mode": 0}]}, "annotation 0 has no category_id"),
        (
            {"annotations": [{"bbox": [1] * 4, "bbox_mode": 77, "category_id": 0}]},
            "bbox_mode is 77",
        ),
        (
            {"annotations": [{"bbox": [1] * 4, "bbox_mode": 0, "category_id": 2}]},
            "category_id is 2, not 0 to 1",
        ),
        (
            {"annotations": [{"bbox": "1 2 3 4", "bbox_mode": 0, "category_id": 1}]},
            "bbox '1 2 3 4' is not",
        ),
        ({"annotations": None}, "image .*1.jpg: annotations is None, not a list"),
        *(
            ({"annotations": [{**OBJECT, **change}]}, f"image .*1.jpg, annotation 0: {expected}")
            for change, expected in (
                ({"bbox": [1, 2, 3]}, r"bbox \[1, 2, 3\] is not 4 finite numbers"),
                ({"bbox_mode": BoxMode.XYWHA_ABS}, "bbox .* is not 5 finite numbers"),
                ({"bbox_mode": BoxMode.XYXY_REL}, "bbox_mode is XYXY_REL, .*in pixels"),
                ({"bbox_mode": BoxMode.XYWH_REL}, "bbox_mode is XYWH_REL, .*in pixels"),
                ({"segmentation": 5}, "segmentation is of type int"),
                ({"segmentation": "x.png"}, "segmentation is of type str"),
                ({"segmentation": torch.zeros(64, 80)}, "segmentation is of type Tensor: .*NumPy"),
            )
        ),
        ({"made_by": lambda x: x}, "image .*1.jpg: made_by cannot be pickled .*leave it out"),
    ],
)
def test_a_field_that_cannot_be_used_is_named(tiny_data, made, change, expected):
    made("made_train", lambda: [{**_dicts(tiny_data)[0], **change}])
    with pytest.raises(UserError, match=expected):
        load_train_set(_config(DATASETS__TRAIN="('made_train',)"))


@pytest.mark.parametrize("kind", [iter, lambda d: map(dict, d), lambda d: None])
def test_a_function_that_returns_no_list_is_named(tiny_data, made, kind):
    made("made_train", lambda: kind(_dicts(tiny_data)))
    with pytest.raises(UserError, match="made_train: its function returns a .*, not a list of"):
        load_train_set(_config(DATASETS__TRAIN="('made_train',)"))


@pytest.mark.parametrize("filtered", [True, False])
@pytest.mark.parametrize("lacking", [(0,), (2,), (0, 1, 2)])
def test_images_that_are_not_annotated(tiny_data, made, tmp_path, lacking, filtered):
    def dicts():
        plain = [{**_dicts(tiny_data)[0], "annotations": [OBJECT]} for _ in range(3)]
        for n in lacking:
            del plain[n]["annotations"]
        return plain

    for name in NAMES:
        made(name, dicts)
    names = {"DATASETS__TRAIN": "('made_train',)", "DATASETS__TEST": "('made_val',)"}
    cfg = _config(
        **names,
        OUTPUT_DIR=tmp_path,
        MODEL__ROI_HEADS__NUM_CLASSES=2,
        MODEL__MASK_ON=False,
        DATALOADER__FILTER_EMPTY_ANNOTATIONS=filtered,
    )
    Trainer.check_data(cfg, train=False)
    expected = rf"{len(lacking)} of 3 images \(.*1.jpg\) of made_train have no annotations"
    with pytest.raises(UserError, match=expected):
        Trainer.check_data(cfg)


@pytest.mark.parametrize("kind", [tuple, np.array])
def test_class_names_that_are_no_list(tiny_data, made, tmp_path, kind):
    for name in NAMES:
        made(name, lambda: [{**_dicts(tiny_data)[0], "annotations": [OBJECT]}])
        MetadataCatalog.get(name).thing_classes = kind(MetadataCatalog.pop(name).thing_classes)
        MetadataCatalog.get(name).evaluator_type = "coco"
    names = {"DATASETS__TRAIN": "('made_train',)", "DATASETS__TEST": "('made_val',)"}
    changes = {"MODEL__ROI_HEADS__NUM_CLASSES": 0, "MODEL__MASK_ON": False}
    cfg = set_num_classes(_config(**names, OUTPUT_DIR=tmp_path, **changes))
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2
    Trainer.check_data(cfg)
    assert class_names(cfg, NAMES) == {"thing_classes": ["x", "y"]}


@pytest.mark.parametrize(
    "metadata, expected",
    [
        ({"evaluator_type": ["coco"]}, r"evaluator_type \['coco'\]: known are coco, "),
        ({"thing_dataset_id_to_contiguous_id": {7: 0}}, r"class 1 \('y'\) an id, but it has none"),
        ({"thing_dataset_id_to_contiguous_id": {"a": 0, "b": 1}}, "'a' is not a whole number"),
        ({"thing_dataset_id_to_contiguous_id": {7: 0, 8: 1, 9: 2}}, "3 ids for 2 classes"),
        ({"thing_dataset_id_to_contiguous_id": [7, 8]}, "contiguous_id is a list, not a dict"),
    ],
)
def test_metadata_that_no_evaluation_can_use(tiny_data, made, metadata, expected):
    made("made_val", lambda: [{**_dicts(tiny_data)[0], "annotations": [OBJECT]}])
    vars(MetadataCatalog.get("made_val")).update(metadata)
    cfg = _config(DATASETS__TEST="('made_val',)")
    with pytest.raises(UserError, match=f"data set made_val.*{expected}"):
        Trainer.build_evaluator(cfg, "made_val")


def test_pixels_in_memory_need_another_mapper(made, tmp_path):
    def dicts():
        pixels = {"image": np.zeros((64, 80, 3), "uint8"), "height": 64, "width": 80}
        return [{**pixels, "image_id": 7, "annotations": [OBJECT]}]

    made("made_train", dicts)
    names = {"DATASETS__TRAIN": "('made_train',)", "DATASETS__TEST": "('made_train',)"}
    changes = {"MODEL__ROI_HEADS__NUM_CLASSES": 2, "MODEL__MASK_ON": False}
    cfg = _config(**names, OUTPUT_DIR=tmp_path, **changes)
    Trainer.check_data(cfg)
    with pytest.raises(UserError, match="image 7 has no file_name, .*build_mapper"):
        next(iter(Trainer.build_test_loader(cfg, "made_train")))


def test_errors_of_the_users_own_function_keep_their_type(made):
    def broken():
        raise KeyError("a typing error")

    made("made_train", broken)
    with pytest.raises(KeyError, match="typing error"):
        load_train_set(_config(DATASETS__TRAIN="('made_train',)"))


def test_training_and_evaluating_what_a_function_makes(tiny_data, made, train_net, tmp_path):
    def dicts():
        d = _dicts(tiny_data)[0]
        return [{**d, "annotations": d["annotations"][:4]} for _ in range(4)]

    for name in NAMES:
        made(name, dicts)
    names = {"DATASETS__TRAIN": "('made_train',)", "DATASETS__TEST": "('made_val',)"}
    changes = {"MODEL__ROI_HEADS__NUM_CLASSES": 0, "INPUT__MASK_FORMAT": "bitmask"}
    options = tiny.opts(OUTPUT_DIR=tmp_path, **names, **changes)
    result = train_net("--config-file", tiny.CONFIG, *options)
    assert result.status == 0, result.err
    truth = json.loads((tmp_path / "inference/made_val_coco_format.json").read_text())
    assert len(truth["images"]) == 4 and len(truth["annotations"]) == 16
    assert {a["category_id"] for a in truth["annotations"]} == {1}
    # 0 stands for the data's number; the run's config says which.
    assert load_config(str(tmp_path / "config.yaml")).MODEL.ROI_HEADS.NUM_CLASSES == 2


def test_text_as_image_id_trains_and_is_named_where_it_cannot_be_evaluated(tiny_data, made):
    made("made_train", lambda: [{**_dicts(tiny_data)[0], "image_id": "a"}])
    names = {"DATASETS__TRAIN": "('made_train',)", "DATASETS__TEST": "('made_train',)"}
    cfg = _config(**names, MODEL__ROI_HEADS__NUM_CLASSES=2)
    assert load_train_set(cfg).dicts[0]["image_id"] == "a"
    with pytest.raises(UserError, match="image_id 'a' is not a whole number"):
        Trainer.build_evaluator(cfg, "made_train")


def test_group_field_of_a_file_reaches_the_dicts(made, tmp_path, tiny_data):
    content = json.loads((tiny_data / "coco/annotations/instances_train2017.json").read_text())
    for n, image in enumerate(content["images"]):
        image.update(camera=n % 3, group="all")
    file = tmp_path / "made.json"
    file.write_text(json.dumps(content))
    made("made_train", file, tiny_data / "coco/train2017")
    grouped = {
        "DATASETS__TRAIN": "('made_train',)",
        "DATALOADER__SAMPLER_TRAIN": "GroupedTrainingSampler",
        "DATALOADER__GROUPING_STRENGTH": 1.0,
    }
    batches = iter(Trainer.build_train_loader(_config(DATALOADER__GROUP_FIELD="camera", **grouped)))
    for _ in range(6):
        assert len({d["camera"] for d in next(batches)}) == 1
    with pytest.raises(UserError, match="of made_train are of one group: .*GROUP_FIELD"):
        next(iter(Trainer.build_train_loader(_config(**grouped))))
