"""refbn-d2 data: a config that `add` writes can be trained, and `show` draws its images."""

import json
import re
import sys

import pytest
import tiny
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from refbn_d2.commands import data
from refbn_d2.config import load_config
from refbn_d2.data.checks import check_test_sets
from refbn_d2.errors import UserError


@pytest.fixture
def command(monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["refbn-d2 data", *map(str, arguments)])
        capfd.readouterr()
        try:
            data.main()
        except SystemExit as e:
            return e.code, capfd.readouterr().err
        return 0, capfd.readouterr().out

    yield run
    for name in ("mine_train", "mine_val"):
        for catalog in (DatasetCatalog, MetadataCatalog):
            if name in catalog.list():
                catalog.remove(name)


@pytest.fixture
def files(tiny_data):
    coco = tiny_data / "coco"
    return [
        *("--json", coco / "annotations/instances_train2017.json", "--images", coco / "train2017"),
        "--val-json",
        *(coco / "annotations/instances_val2017.json", "--val-images", coco / "val2017"),
    ]


def test_add_then_show_then_train(command, files, train_net, tmp_path):
    status, out = command("add", "mine", *files, "--base", tiny.CONFIG)
    assert status == 0 and "mine_train: 12 images, 24 objects" in out and "person" in out
    cfg = load_config("mine.yaml")
    assert cfg.DATASETS.TRAIN == ("mine_train",) and cfg.DATASETS.TEST == ("mine_val",)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == cfg.MODEL.RETINANET.NUM_CLASSES == 80
    assert cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "polygon"

    assert command("show", "mine", "--output", "page.html", "--samples", 2)[0] == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 2 * 2 and "mine_val: 3 images" in page

    small = {
        k: v for k, v in tiny.SMALL.items() if not k.startswith(("DATASETS", "MODEL.ROI_HEADS.N"))
    }
    options = [x for pair in small.items() for x in pair]
    result = train_net("--config-file", "mine.yaml", *options, "OUTPUT_DIR", tmp_path / "out")
    assert result.status == 0, result.err
    assert (tmp_path / "out/inference/coco_instances_results.json").exists()


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "$x_$", "\ud800", "a\nb\x1b[31m"])
@pytest.mark.parametrize("odd_group", [["\ud800"], "\ud800", None])
def test_names_in_the_data_are_text(command, files, tmp_path, name, odd_group):
    content = json.loads(files[1].read_text())
    content["categories"][0]["name"] = name
    for image in content["images"]:
        image["group"] = odd_group
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert command("add", "mine", "--json", "a.json", *files[2:4])[0] == 0
    assert command("show", "mine", "--output", "page.html", "--samples", 1)[0] == 0
    assert not re.search("<script", (tmp_path / "page.html").read_text())


@pytest.mark.parametrize(
    "name, output, message",
    [
        ("a/b", [], "a/b: the name has a slash; name another folder with --output"),
        ("x" * 300, [], "cannot be written: File name too long; name another file"),
        ("mine", ["--output", "none/x.yaml"], "none/x.yaml cannot be written: No such file"),
        ("mine", ["--output", "/proc/x.yaml"], "/proc/x.yaml cannot be written: No such file"),
    ],
)
def test_a_file_that_cannot_be_written(command, files, tmp_path, name, output, message):
    status, err = command("add", name, *files, *output)
    assert status == 1 and err.startswith("error: ") and message in err
    assert not any(tmp_path.iterdir())


def test_show_without_what_it_needs(command, files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lvis", None)
    status, err = command("show", "lvis_v1_val", "--output", "page.html")
    assert status == 1 and "lvis is not installed: pip install 'lvis'" in err
    assert command("add", "mine", *files)[0] == 0
    status, err = command("show", "mine", "--output", "none/page.html", "--samples", 0)
    assert status == 1 and "none/page.html cannot be written: No such file" in err


def test_show_of_pascal_voc(command, tmp_path):
    from detectron2.data.datasets.pascal_voc import register_pascal_voc

    folder = tmp_path / "VOC2007"
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    (folder / "ImageSets/Main/val.txt").write_text("1\n2\n")
    for n in (1, 2):
        Image.new("RGB", (80, 60)).save(folder / f"JPEGImages/{n}.jpg")
        box = "<xmin>11</xmin><ymin>11</ymin><xmax>30</xmax><ymax>30</ymax>"
        (folder / f"Annotations/{n}.xml").write_text(
            "<annotation><size><width>80</width><height>60</height></size>"
            f"<object><name>dog</name><bndbox>{box}</bndbox></object></annotation>"
        )
    register_pascal_voc("mine_val", str(folder), "val", 2007)
    status, out = command("show", "mine_val", "--output", "page.html")
    assert status == 0, out
    summary = "mine_val: 2 images, 2 objects (median size 20 pixels), at most 1 in an image"
    assert summary in (tmp_path / "page.html").read_text()


def test_what_add_says_about_objects(command, files, tmp_path):
    content = json.loads(files[1].read_text())
    empty = content["images"][0]["id"]
    kept = [a for a in content["annotations"] if a["image_id"] != empty]
    for n, a in enumerate(kept):
        a["bbox"][2:], a["iscrowd"] = [n + 1, n + 1], 0
    content["annotations"] = kept
    (tmp_path / "sized.json").write_text(json.dumps(content))
    other = json.loads(files[5].read_text())
    for a in other["annotations"]:
        del a["segmentation"]
    (tmp_path / "boxes.json").write_text(json.dumps(other))
    args = ["--json", "sized.json", *files[2:4], "--val-json", "boxes.json", *files[6:]]
    status, out = command("add", "mine", *args)
    assert status == 0, out
    assert f"(median size {len(kept) // 2 + 1} pixels)" in out
    assert "  1 images without objects" in out and "images have objects without a mask" in out
    # Masks could be trained, but not evaluated.
    assert not load_config("mine.yaml").MODEL.MASK_ON
    cfg = load_config("mine.yaml", ["MODEL.MASK_ON", "True"])
    with pytest.raises(UserError, match="MASK_ON is True, .*boxes.json have objects without a"):
        check_test_sets(cfg)


def test_show_needs_objects_with_classes(command, tmp_path):
    DatasetCatalog.register(
        "mine_val", lambda: [{"file_name": "a.png", "image_id": 1, "height": 2, "width": 2}]
    )
    status, err = command("show", "mine_val", "--output", "page.html")
    assert status == 1 and "mine_val: has no classes of objects" in err
    config = tmp_path / "a.yaml"
    config.write_text(f"_BASE_: {tiny.CONFIG}\nDATASETS: {{TRAIN: [], TEST: [tiny_val]}}\n")
    status, out = command("show", "a.yaml", "--output", "page.html")
    assert status == 0 and "tiny_val" in (tmp_path / "page.html").read_text()
    status, err = command("show", "a.yaml", "--output", "page.html", "--samples", -1)
    assert status == 1 and "--samples -1: use a number from 0" in err


def test_mistakes_are_one_line_and_write_nothing(command, files, tmp_path):
    for arguments, expected in [
        (["--json", "nowhere.json", *files[2:4]], "nowhere.json: no such file"),
        ([*files[:2], "--images", "nowhere"], "nowhere: no such folder"),
        ([*files[:4], *files[4:6]], "belong together"),
    ]:
        status, err = command("add", "mine", *arguments)
        assert status == 1 and expected in err and err.startswith("error: ")
        assert not (tmp_path / "mine.yaml").exists()
    other = json.loads(files[5].read_text())
    other["categories"][0]["name"] = "another"
    (tmp_path / "b.json").write_text(json.dumps(other))
    status, err = command("add", "mine", *files[:4], "--val-json", "b.json", *files[6:])
    assert (
        status == 1
        and "are not those of" in err
        and "another, person" in err
        and not (tmp_path / "mine.yaml").exists()
    )
    without = json.loads(files[1].read_text())
    without["images"][-1]["file_name"] = "none.jpg"
    (tmp_path / "c.json").write_text(json.dumps(without))
    status, err = command("add", "mine", "--json", "c.json", *files[2:4])
    assert status == 1 and "images do not exist" in err and not (tmp_path / "mine.yaml").exists()
    status, err = command("show", "nothing", "--output", "page.html")
    assert status == 1 and "neither a data set" in err


@pytest.mark.parametrize("masks", [True, False])
def test_samples_of_one_class_are_drawn(command, files, tmp_path, masks):
    content = json.loads(files[1].read_text())
    for a in content["annotations"]:
        a["category_id"] = content["categories"][0]["id"]
        if not masks:
            del a["segmentation"]
    content["categories"] = content["categories"][:1]
    (tmp_path / "one.json").write_text(json.dumps(content))
    args = ("--json", tmp_path / "one.json", *files[2:4])
    status, out = command("add", "mine", *args, "--base", "")
    assert status == 0, out
    cfg = load_config("mine.yaml")
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 1 and cfg.MODEL.MASK_ON is masks
    assert command("show", "mine", "--output", "page.html", "--samples", 3)[0] == 0
    assert (tmp_path / "page.html").read_text().count("data:image/jpeg;base64,") == 3
