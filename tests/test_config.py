"""Loading a config: no code is run, and errors say what to change."""

import json

import pytest
import tiny
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from refbn_d2 import RefBatchNorm2d, add_refbn_config
from refbn_d2.config import KEYS, apply_norm_config, keys_table, load_config
from refbn_d2.errors import UserError

# Would write a file if it were run.
EVIL = "MODEL:\n  WEIGHTS: !!python/object/apply:os.system ['touch {}']\n"


def _write(path, text):
    path.write_text(text)
    return str(path)


def test_defaults_are_the_papers():
    cfg = get_cfg()
    add_refbn_config(cfg)
    refbn = cfg.MODEL.REFBN
    assert refbn.PSEUDO_COUNT == 1.0
    assert dict(refbn.REFERENCE) == {"SEED": 0, "NUM_IMAGES": 0, "REFRESH_PERIOD": 0}


def test_file_base_and_command_line_in_this_order(tmp_path):
    _write(tmp_path / "base.yaml", "SEED: 1\nSOLVER:\n  MAX_ITER: 1\n  BASE_LR: 1.0\n")
    leaf = _write(tmp_path / "leaf.yaml", "_BASE_: base.yaml\nSOLVER:\n  MAX_ITER: 2\n")
    cfg = load_config(leaf, ["MODEL.REFBN.PSEUDO_COUNT", "2.5"])
    assert (cfg.SEED, cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR) == (1, 2, 1.0)
    assert cfg.MODEL.REFBN.PSEUDO_COUNT == 2.5
    assert load_config("", ["SEED", "5"]).SEED == 5


@pytest.mark.parametrize("where", ["file", "base"])
def test_python_in_yaml_is_refused_and_not_run(tmp_path, where):
    witness = tmp_path / "witness"
    path = _write(tmp_path / "evil.yaml", EVIL.format(witness))
    if where == "base":
        path = _write(tmp_path / "leaf.yaml", "_BASE_: evil.yaml\n")
    with pytest.raises(UserError, match="evil.yaml.*not plain YAML.*python/object") as e:
        load_config(path)
    assert not witness.exists() and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("MODEL:\n  REFBN:\n    PSUEDO_COUNT: 1\n", "did you mean MODEL.REFBN.PSEUDO_COUNT"),
        ("MODEL:\n  REFBN:\n    REFERENCE:\n      SEEDS: 1\n", "MODEL.REFBN.REFERENCE.SEED?"),
        ("MODEL:\n  REFBN:\n    PSEUDO_COUNT: many\n", "PSEUDO_COUNT"),
        ("MODEL: [1\n", "not plain YAML"),
        ("MODEL: 3\n", "config.yaml"),
        ("- a list\n", "list"),
        ("_BASE_: nowhere.yaml\n", "nowhere.yaml"),
        ("_BASE_: config.yaml\n", "config.yaml"),
    ],
)
def test_a_bad_file_is_a_one_line_error(tmp_path, text, expected):
    path = _write(tmp_path / "config.yaml", text)
    with pytest.raises(UserError) as e:
        load_config(path)
    assert expected in str(e.value)


@pytest.mark.parametrize(
    "key, value",
    [
        ("PSEUDO_COUNT", "-1.0"),
        ("PSEUDO_COUNT", "float('nan')"),
        ("PSEUDO_COUNT", "nan"),
        ("PSEUDO_COUNT", "inf"),
        ("PSEUDO_COUNT", "1e999"),
        ("PSEUDO_COUNT", "True"),
        ("REFERENCE.SEED", "-1"),
        ("REFERENCE.SEED", str(2**32)),
        ("REFERENCE.SEED", "1.5"),
        ("REFERENCE.SEED", "x"),
        ("REFERENCE.NUM_IMAGES", "-4"),
        ("REFERENCE.REFRESH_PERIOD", "-1"),
        ("REFERENCE.REFRESH_PERIOD", "0.5"),
    ],
)
def test_a_bad_value_is_an_error_that_names_the_key(key, value):
    with pytest.raises(UserError) as e:
        load_config("", [f"MODEL.REFBN.{key}", value])
    assert key.split(".")[-1] in str(e.value)


@pytest.mark.parametrize(
    "opts, expected",
    [
        (["MODEL.REFBN.PSEUDOCOUNT", "1"], "MODEL.REFBN.PSEUDO_COUNT"),
        (["MODEL.REFBN.REFERENCE.REFRESH", "1"], "MODEL.REFBN.REFERENCE.REFRESH_PERIOD"),
        (["MODEL.REFBM.PSEUDO_COUNT", "1"], "MODEL.REFBN.PSEUDO_COUNT"),
        (["SEED"], "SEED"),
        (["SEED", "-2"], "SEED is -2"),
        (["SEED", str(2**32)], f"SEED is {2**32}"),
        (["DATALOADER.GROUPING_STRENGTH", "1.5"], "GROUPING_STRENGTH"),
    ],
)
def test_a_bad_command_line_is_an_error(opts, expected):
    with pytest.raises(UserError) as e:
        load_config("", opts)
    assert expected in str(e.value)


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_mixed_precision_needs_cuda(device):
    opts = ["SOLVER.AMP.ENABLED", "True", "MODEL.DEVICE"]
    load_config("", [*opts, "cuda:1"])
    with pytest.raises(UserError, match=f"SOLVER.AMP.* {device}: it needs a GPU of CUDA; set it"):
        load_config("", [*opts, device])


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match="no/such.yaml"):
        load_config("no/such.yaml")


def test_norms_get_the_configured_pseudo_count():
    cfg = load_config("", ["MODEL.REFBN.PSEUDO_COUNT", "3.0"])
    layer = RefBatchNorm2d(2)
    assert apply_norm_config(layer, cfg) is layer
    assert layer.pseudo_count == 3.0 and isinstance(layer.pseudo_count, float)


def test_all_configs_of_the_repository_load():
    paths = sorted((tiny.ROOT / "configs").rglob("*.yaml"))
    paths = [p for p in paths if p.parent.name != "Matrix"]  # not configs, but lists of them
    assert len(paths) >= 12
    for path in paths:
        load_config(str(path))


def test_protocol_a_freezes_every_norm_and_reads_pixels_as_its_pretraining():
    """SPEC section 4: frozen to affine maps; pixels and strides of the pretraining."""
    coco = tiny.ROOT / "configs/COCO-InstanceSegmentation"
    pretraining = load_config(str(tiny.ROOT / "configs/ImageNet/Base-paper.yaml"))
    for length in ("1x", "3x"):
        frozen = load_config(str(coco / f"mask_rcnn_R_50_C4_{length}_from_refbn_frozen.yaml"))
        assert frozen.MODEL.RESNETS.NORM == "FrozenBN" and not frozen.MODEL.RESNETS.STRIDE_IN_1X1
        assert frozen.INPUT.FORMAT == pretraining.INPUT.FORMAT == "RGB"
        assert frozen.MODEL.PIXEL_MEAN == pretraining.MODEL.PIXEL_MEAN
        assert frozen.MODEL.PIXEL_STD == pretraining.MODEL.PIXEL_STD
        live = load_config(str(coco / f"Base-live-{length}.yaml"))
        assert frozen.SOLVER == live.SOLVER and frozen.MODEL.RPN == live.MODEL.RPN


def test_the_documented_table_is_that_of_the_code():
    page = (tiny.ROOT / "docs/config.md").read_text()
    table = page.split("<!-- keys -->\n")[1].split("\n<!-- end of keys -->")[0]
    assert table == keys_table()
    defaults = load_config("")
    for key in KEYS:
        assert f"| `{key.name}` |" in page and key.range.holds(key.default)
        value = defaults
        for part in key.name.split("."):
            value = value[part]
        assert value == key.default and type(value) is type(key.default)


def test_each_file_is_opened_once(tmp_path, monkeypatch):
    _write(tmp_path / "base.yaml", "SEED: 1\n")
    middle = _write(tmp_path / "middle.yaml", "_BASE_: base.yaml\nSOLVER: {MAX_ITER: 7}\n")
    leaf = _write(tmp_path / "leaf.yaml", f"_BASE_: [{middle}]\n")
    opened = []

    def counting(file, *args, **kwargs):
        opened.append(str(file))
        return original(file, *args, **kwargs)

    original = open
    monkeypatch.setattr("builtins.open", counting)
    cfg = load_config(leaf)
    assert cfg.SEED == 1 and cfg.SOLVER.MAX_ITER == 7
    names = [name.rsplit("/", 1)[-1] for name in opened if name.endswith(".yaml")]
    assert sorted(names) == ["base.yaml", "leaf.yaml", "middle.yaml"]


def test_an_old_config_is_brought_up_to_date(tmp_path):
    """What detectron2 does with version 1: a key that has another name today."""
    old = "VERSION: 1\nMODEL: {WEIGHT: a.pkl}\n"
    assert load_config(_write(tmp_path / "old.yaml", old)).MODEL.WEIGHTS == "a.pkl"


@pytest.fixture
def own_names():
    yield
    for name in ("mine_train", "mine_val"):
        for catalog in (DatasetCatalog, MetadataCatalog):
            if name in catalog.list():
                catalog.remove(name)


def _register(name, json_file, images="."):
    return (
        f"DATASETS:\n  REGISTER:\n    {name}: {{JSON: {json_file}, IMAGES: {images}}}\n"
        f"  TRAIN: ('{name}',)\n"
    )


def _coco_file(path, file_name):
    path.parent.mkdir(exist_ok=True)
    image = {"id": 1, "file_name": file_name, "height": 4, "width": 4}
    path.write_text(
        json.dumps({"images": [image], "annotations": [], "categories": [{"id": 1, "name": "x"}]})
    )


def test_data_sets_of_a_config_are_known_by_name(tmp_path, monkeypatch, own_names):
    """Paths are relative to the file that has them, also in a base in another folder."""
    _coco_file(tmp_path / "data/a.json", "a.jpg")
    _coco_file(tmp_path / "b.json", "b.jpg")
    _write(tmp_path / "data/base.yaml", _register("mine_train", "a.json", "images"))
    monkeypatch.setenv("HERE", str(tmp_path))
    leaf = _write(
        tmp_path / "leaf.yaml",
        "_BASE_: data/base.yaml\n" + _register("mine_val", "$HERE/b.json", "pictures"),
    )
    monkeypatch.chdir("/")
    cfg = load_config(leaf)
    (a,), (b,) = (DatasetCatalog.get(n) for n in ("mine_train", "mine_val"))
    assert a["file_name"] == str(tmp_path / "data/images/a.jpg")
    assert b["file_name"] == str(tmp_path / "pictures/b.jpg")
    assert MetadataCatalog.get("mine_val").thing_classes == ["x"]
    # As the run writes it down.
    again = load_config(_write(tmp_path / "data/config.yaml", cfg.dump()))
    assert again.DATASETS.REGISTER == cfg.DATASETS.REGISTER
    # The name goes to other files with another config.
    load_config(_write(tmp_path / "c.yaml", _register("mine_val", "data/a.json", "x")))
    assert DatasetCatalog.get("mine_val")[0]["file_name"] == str(tmp_path / "x/a.jpg")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("{mine_train: 3}", "REGISTER.mine_train is 3: use {JSON: "),
        ("{mine_train: {JSON: a.json}}", "REGISTER.mine_train is .*use {JSON: "),
        ("{mine_train: {JSON: a, IMAGES: b, X: 1}}", "REGISTER.mine_train is .*use {JSON: "),
        ("{mine_train: {JSON: 5, IMAGES: b}}", "REGISTER.mine_train.JSON is 5: use a path"),
        ("{coco_2017_val: {JSON: a, IMAGES: b}}", "coco_2017_val: a data set of this name exists"),
        ("3", "REGISTER"),
    ],
)
def test_a_bad_entry_of_register(tmp_path, text, expected):
    path = _write(tmp_path / "c.yaml", f"DATASETS: {{REGISTER: {text}}}\n")
    with pytest.raises(UserError, match=expected):
        load_config(path)
    assert "mine_train" not in DatasetCatalog.list()
