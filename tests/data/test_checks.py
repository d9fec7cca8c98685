"""The comparisons before the first step, and that errors name both sides."""

import json

import pytest
import tiny
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from refbn_d2.config import load_config
from refbn_d2.data.checks import set_num_classes
from refbn_d2.engine import Trainer
from refbn_d2.errors import UserError


def _read(folder, split):
    content = json.loads((folder / f"coco/annotations/instances_{split}2017.json").read_text())
    content["categories"] = content["categories"][:3]
    return content


@pytest.fixture
def own(tiny_data, tmp_path):
    """Registers own_train and own_val, both with three classes, after changes to each."""

    def register(change_train=None, change_val=None):
        for split, change in (("train", change_train), ("val", change_val)):
            content = _read(tiny_data, split)
            if change:
                change(content)
            file = tmp_path / f"own_{split}.json"
            file.write_text(json.dumps(content))
            _forget(f"own_{split}")
            root = str(tiny_data / f"coco/{split}2017")
            register_coco_instances(f"own_{split}", {}, str(file), root)

    register()
    yield register
    for split in ("train", "val"):
        _forget(f"own_{split}")


def _forget(name):
    for catalog in (DatasetCatalog, MetadataCatalog):
        if name in catalog.list():
            catalog.remove(name)


def _config(**changes):
    names = {"DATASETS__TRAIN": "('own_train',)", "DATASETS__TEST": "('own_val',)"}
    return load_config(
        tiny.CONFIG, tiny.opts(**{**names, "MODEL__ROI_HEADS__NUM_CLASSES": 3, **changes})
    )


def test_what_fits_passes(own):
    Trainer.check_data(_config())


@pytest.mark.parametrize("number", [2, 5, 80])
def test_another_number_of_classes(own, number):
    expected = (
        f"own_train has 3 classes, .*NUM_CLASSES is {number}: set it to 3 .person, bicycle, car"
    )
    with pytest.raises(UserError, match=expected):
        Trainer.check_data(_config(MODEL__ROI_HEADS__NUM_CLASSES=number))
    with pytest.raises(UserError, match=f"own_val has 3 classes.*NUM_CLASSES is {number}"):
        Trainer.check_data(_config(MODEL__ROI_HEADS__NUM_CLASSES=number), train=False)


def test_retinanet_has_a_key_of_its_own(own):
    retina = {"MODEL__META_ARCHITECTURE": "RetinaNet", "MODEL__ROI_HEADS__NUM_CLASSES": 77}
    with pytest.raises(UserError, match="MODEL.RETINANET.NUM_CLASSES is 80"):
        Trainer.check_data(_config(**retina))
    Trainer.check_data(_config(**retina, MODEL__RETINANET__NUM_CLASSES=3))
    cfg = set_num_classes(_config(**retina, MODEL__RETINANET__NUM_CLASSES=0))
    assert cfg.MODEL.RETINANET.NUM_CLASSES == 3 and cfg.MODEL.ROI_HEADS.NUM_CLASSES == 77


def _fewer(content):
    content["categories"] = content["categories"][:2]
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] < 3]


def _reordered(content):
    first, second, _ = content["categories"]
    first["name"], second["name"] = second["name"], first["name"]


@pytest.mark.parametrize(
    "change, expected",
    [
        (_fewer, "own_val has 2 classes .person, bicycle., own_train has 3 .person, bicycle, car."),
        (_reordered, "own_val has 3.*own_train has 3.*class 0 is 'bicycle' and 'person'"),
    ],
)
def test_val_with_other_classes(own, change, expected):
    own(change_val=change)
    with pytest.raises(UserError, match=expected):
        Trainer.check_data(_config())


def test_the_same_classes_under_other_ids_pass(own):
    def shift(content):
        for category in content["categories"]:
            category["id"] += 10
        for annotation in content["annotations"]:
            annotation["category_id"] += 10

    own(change_val=shift)
    Trainer.check_data(_config())


def test_the_data_give_the_number_that_is_left_to_them(own):
    cfg = _config(MODEL__ROI_HEADS__NUM_CLASSES=0)
    assert set_num_classes(cfg).MODEL.ROI_HEADS.NUM_CLASSES == 3
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 0
    own(change_val=_fewer)  # nothing is trained: the data at hand are the test data
    assert set_num_classes(cfg, evaluate=True).MODEL.ROI_HEADS.NUM_CLASSES == 2
    cfg = _config(MODEL__ROI_HEADS__NUM_CLASSES=0, DATASETS__TRAIN="()")
    with pytest.raises(UserError, match="NUM_CLASSES is 0, and no data set"):
        set_num_classes(cfg)


def _without_masks(content):
    for annotation in content["annotations"][3:]:
        del annotation["segmentation"]


def _crowds_without_masks(content):
    for annotation in content["annotations"][3:]:
        annotation["iscrowd"] = 1
        del annotation["segmentation"]


def _runs(content):
    size = {i["id"]: [i["height"], i["width"]] for i in content["images"]}
    for annotation in content["annotations"][:1]:
        height, width = size[annotation["image_id"]]
        counts = [height, 5, height * width - height - 5]
        annotation["segmentation"] = {"size": [height, width], "counts": counts}


def _keypoints(number):
    def change(content):
        for annotation in content["annotations"]:
            annotation["keypoints"] = [20, 20, 2] * number

    return change


@pytest.mark.parametrize(
    "change, options, expected",
    [
        (_without_masks, {}, r"MODEL.MASK_ON is True, but \d+ of 12 images .*own_train.json"),
        (_without_masks, {"MODEL__MASK_ON": False}, None),
        (_crowds_without_masks, {}, None),
        (_runs, {}, "INPUT.MASK_FORMAT is polygon, but 1 of 12 .*set INPUT.MASK_FORMAT bitmask"),
        (_runs, {"INPUT__MASK_FORMAT": "bitmask"}, None),
        (_runs, {"MODEL__MASK_ON": False}, None),
        (None, {"MODEL__KEYPOINT_ON": True}, "KEYPOINT_ON is True, but no object of own_train"),
        (_keypoints(5), {"MODEL__KEYPOINT_ON": True}, "have 5 keypoints, .*NUM_KEYPOINTS is 17"),
        (_keypoints(17), {"MODEL__KEYPOINT_ON": True}, "own_train has no keypoint_names"),
        (
            None,
            {
                "MODEL__META_ARCHITECTURE": "SemanticSegmentor",
                "MODEL__SEM_SEG_HEAD__NUM_CLASSES": 3,
                "DATASETS__TEST": "()",
            },
            "META_ARCHITECTURE is SemanticSegmentor, but 12 of 12 images .*sem_seg_file_name",
        ),
    ],
)
def test_a_config_that_asks_for_what_the_data_lack(own, change, options, expected):
    own(change_train=change)
    if expected is None:
        return Trainer.check_data(_config(**options))
    with pytest.raises(UserError, match=expected):
        Trainer.check_data(_config(**options))


def test_without_any_object(own):
    own(change_train=lambda content: content.update(annotations=[]))
    with pytest.raises(UserError, match="none of the 12 images has an object .*FILTER_EMPTY"):
        Trainer.check_data(_config())


def test_missing_crowd_flags_evaluate_with_both_backends(own, train_net, tmp_path):
    def no_flags(content):
        for annotation in content["annotations"]:
            del annotation["iscrowd"]

    own(no_flags, no_flags)
    found = []
    for backend in ("hotcoco", "pycocotools"):
        options = {
            "OUTPUT_DIR": tmp_path / backend,
            "TEST__COCO_BACKEND": backend,
            "DATASETS__TRAIN": "('own_train',)",
            "DATASETS__TEST": "('own_val',)",
            "MODEL__ROI_HEADS__NUM_CLASSES": 0,
            "MODEL__ROI_HEADS__SCORE_THRESH_TEST": 0.0,
            "SEED": 1,
        }
        result = train_net("--config-file", tiny.CONFIG, *tiny.opts(**options))
        assert result.status == 0, result.err
        lines = (tmp_path / backend / "metrics.json").read_text().splitlines()
        found.append({k: v for k, v in json.loads(lines[-1]).items() if "/AP" in k})
    assert found[0] and str(found[0]) == str(found[1])


def _swapped(content):
    first, second = content["categories"][:2]
    first["name"], second["name"] = second["name"], first["name"]


def _renamed(content):
    content["categories"][0]["name"] = "human"


def _two(content):
    content["categories"].pop()
    known = {c["id"] for c in content["categories"]}
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] in known]


def test_the_classes_that_weights_were_trained_for(own, train_net, tmp_path):
    """Their names are in the checkpoint; without them, classes of equal number look the same."""

    def run(*flags, **changes):
        names = {"DATASETS__TRAIN": "('own_train',)", "DATASETS__TEST": "('own_val',)"}
        options = {"MODEL__ROI_HEADS__NUM_CLASSES": 3, "OUTPUT_DIR": tmp_path / "out", **names}
        result = train_net(
            "--config-file", tiny.CONFIG, *flags, *tiny.opts(**{**options, **changes})
        )
        assert "Traceback" not in result.out + result.err
        return result

    assert run(SOLVER__MAX_ITER=1).status == 0
    weights = str(tmp_path / "out/model_final.pth")
    result = run("--eval-only", MODEL__WEIGHTS=weights)
    assert result.status == 0 and "are these the classes" not in result.out

    own(_swapped, _swapped)
    swapped = f"class 0 of weights {weights!r} is 'person', that of the data 'bicycle'"
    result = run("--eval-only", MODEL__WEIGHTS=weights)
    assert result.status == 1
    assert result.err.splitlines()[-1].startswith(f"error: {swapped}: the same classes in another")
    result = run("--resume", SOLVER__MAX_ITER=2)
    assert result.status == 1 and "error: class 0 of weights" in result.err.splitlines()[-1]
    result = run(MODEL__WEIGHTS=weights, SOLVER__MAX_ITER=1, OUTPUT_DIR=tmp_path / "tuned")
    assert result.status == 0
    assert f"{swapped}: their heads start from those of other classes" in result.out

    own(_renamed, _renamed)
    result = run("--eval-only", MODEL__WEIGHTS=weights)
    assert result.status == 0
    assert "is 'person', that of the data 'human': are these the classes they were" in result.out

    own(_two, _two)
    result = run("--eval-only", MODEL__WEIGHTS=weights, MODEL__ROI_HEADS__NUM_CLASSES=2)
    assert result.status == 1
    last = result.err.splitlines()[-1]
    assert last.startswith(f"error: weights {weights!r} do not fit the model")
    assert "is of shape (4, " in last and " in the file and (3, " in last
    assert "MODEL.ROI_HEADS.NUM_CLASSES" in last
