"""Weights: from .pkl and .pth files only arrays are read, and no code in them is run."""

import copy
import functools
import io
import os
import pickle
import subprocess
import types
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import tiny
import torch

from refbn_d2.config import load_config
from refbn_d2.engine import Trainer
from refbn_d2.engine.checkpoint import Checkpointer
from refbn_d2.weights import safe_pickle
from refbn_d2.weights.convert import convert
from tests.corpus.harness import feed, feed_damaged


class Calls:
    """Pickles to a call."""

    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


class Sets:
    """Pickles to a call whose result is given a state."""

    def __init__(self, function, args, state):
        self.reduced = function, args, state

    def __reduce__(self):
        return self.reduced


def evils():
    """Each makes the folder "ran" where it is run."""
    code = "__import__('os').mkdir('ran')"
    return {
        "mkdir": Calls(os.mkdir, "ran"),
        "system": Calls(os.system, "mkdir ran"),
        "eval": Calls(eval, code),
        "exec": Calls(exec, code),
        "shell": Calls(subprocess.getoutput, "mkdir ran"),
        "import": Calls(__import__, "antigravity"),
        "getattr": Calls(getattr, Calls(__import__, "os"), "mkdir"),
        "loads": Calls(pickle.loads, pickle.dumps(Calls(os.mkdir, "ran"))),
        "torch.load": Calls(torch.load, io.BytesIO(pickle.dumps(Calls(os.mkdir, "ran")))),
        "numpy.load": Calls(np.load, "file.npy", None, True),
        "code": Calls(types.SimpleNamespace),
        "partial": Calls(functools.partial, os.mkdir, "ran"),
        "in a state": Sets(OrderedDict, (), {"x": Calls(os.mkdir, "ran")}),
        "in an item": OrderedDict(x=Calls(os.mkdir, "ran")),
        "in an array": np.array([Calls(os.mkdir, "ran")], dtype=object),
        "in a key": {(1, Calls(os.mkdir, "ran")): 1},
    }


@pytest.fixture(scope="module")
def model():
    return Trainer.build_model(load_config(tiny.CONFIG, tiny.opts()))


@pytest.fixture
def load(model, tmp_path, monkeypatch):
    """Starts training from a file, as the tools do; the model must be what it was if that fails."""
    monkeypatch.chdir(tmp_path)
    cfg = load_config(tiny.CONFIG, tiny.opts(OUTPUT_DIR=tmp_path))

    def function(path):
        checkpointer = Trainer.build_checkpointer(cfg, model)
        line = feed(
            "weights",
            os.path.basename(path),
            lambda: checkpointer.resume_or_load(path, resume=False),
        )
        assert not (tmp_path / "ran").exists()
        return line

    return function


def _pickled(path, content, protocol=2):
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return str(path)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("case", evils())
def test_evil_pkl(case, protocol, load, tmp_path):
    content = {"model": {"x": evils()[case]}, "__author__": "me"}
    try:
        path = _pickled(tmp_path / "evil.pkl", content, protocol)
    except TypeError:  # no protocol can
        assert case in ("torch.load",)
        return
    assert load(path) is not None


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("case", [c for c in evils() if c != "torch.load"])
def test_evil_pth(case, legacy, load, tmp_path):
    path = tmp_path / "evil.pth"
    torch.save({"model": {"x": evils()[case]}}, path, _use_new_zipfile_serialization=not legacy)
    assert load(str(path)) is not None
    target = tmp_path / "out.pth"
    assert feed("weights", "evil.pth", lambda: convert(str(path), str(target))) is not None
    assert not list(tmp_path.glob("out.pth*")) and not (tmp_path / "ran").exists()


WEIGHT, ARCH = "backbone.res2.0.conv1.weight", "another architecture"


def with_weight(value):
    """The weights of the model with one of them replaced."""
    return lambda state: {"model": {**state, WEIGHT: value(state[WEIGHT])}}


def without(word):
    return lambda state: {"model": {k: v for k, v in state.items() if word not in k}}


# Name -> (weights of the model to what is saved, a word of the error; None: loads as documented).
DAMAGES = {
    "nothing": (lambda state: None, ""),
    "number": (lambda state: 3, ""),
    "text": (lambda state: "model", ""),
    "list": (lambda state: [1, 2], ""),
    "tensor": (lambda state: torch.zeros(3), ""),
    "empty dict": (lambda state: {}, ARCH),
    "model is nothing": (lambda state: {"model": None}, "holds a NoneType, not weights by name"),
    "model is a list": (lambda state: {"model": [1, 2]}, "holds a list, not weights"),
    "model is a tensor": (lambda state: {"model": torch.zeros(2)}, "holds a"),
    "model is empty": (lambda state: {"model": {}}, ARCH),
    "keys are numbers": (lambda state: {"model": {3: torch.zeros(1)}}, "has the name 3 among"),
    "value is a text": (with_weight(lambda v: "x"), ""),
    "value is nothing": (with_weight(lambda v: None), ""),
    "value is a list": (with_weight(lambda v: [1.0, 2.0]), ""),
    "value is a dict": (with_weight(lambda v: {"a": v}), ""),
    "wrong shape": (with_weight(lambda v: torch.zeros(3, 3)), ARCH),
    "scalar": (with_weight(lambda v: torch.tensor(1.0)), ARCH),
    "no values": (with_weight(lambda v: torch.zeros(0)), ARCH),
    "NaN": (with_weight(lambda v: v * float("nan")), "not finite"),
    "infinity": (with_weight(lambda v: v / 0), "not finite"),
    "view of a trillion values": (with_weight(lambda v: torch.zeros(1).expand(10**12)), ARCH),
    "sparse": (with_weight(lambda v: v.to_sparse()), ""),
    "truth values": (with_weight(lambda v: v > 0), None),
    "on no device": (with_weight(lambda v: v.to("meta")), ""),
    "extra key": (lambda state: {"model": {**state, "extra": torch.zeros(2)}}, None),
    "extra block": (lambda s: {"model": {**s, "backbone.res2.7.conv1.weight": s[WEIGHT]}}, ARCH),
    "in float16": (lambda state: {"model": {k: v.half() for k, v in state.items()}}, None),
    "other classes": (
        lambda state: {"model": {k: v[:3] if "cls_score" in k else v for k, v in state.items()}},
        None,
    ),
    "no backbone": (without("backbone"), ARCH),
    "no statistics": (without("running_"), ARCH),
    "no reference": (without("ref_"), None),
    "half a reference": (without("ref_mean"), ARCH),
    "without a dict around": (lambda state: dict(state), None),
}


@pytest.fixture(scope="module")
def state(model):
    return copy.deepcopy(model.state_dict())


@pytest.mark.parametrize("case", DAMAGES)
def test_content_of_pth(case, load, model, state, tmp_path):
    content, word = DAMAGES[case]
    torch.save(content(state), tmp_path / "bad.pth")
    line = load(str(tmp_path / "bad.pth"))
    model.load_state_dict(state)
    assert line is None if word is None else word in line


# Where the two differ: a .pkl without an author is Caffe2's, whose names are others.
_PKL = {"empty dict": "cannot be read", "without a dict around": ARCH}


@pytest.mark.parametrize("case", DAMAGES)
def test_content_of_pkl(case, load, model, state, tmp_path):
    content, word = DAMAGES[case]
    if case in ("sparse", "on no device", "view of a trillion values"):
        return  # not a thing of NumPy's
    content = _as_arrays(content(state))
    if isinstance(content, dict) and "model" in content:
        content["__author__"] = "somebody"
    line = load(_pickled(tmp_path / "bad.pkl", content))
    model.load_state_dict(state)
    word = _PKL.get(case, word)
    assert line is None if word is None else word in line


def _as_arrays(value):
    if isinstance(value, dict):
        return {k: _as_arrays(v) for k, v in value.items()}
    return value.numpy() if isinstance(value, torch.Tensor) else value


def _small_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3))


@functools.lru_cache(None)
def _small_file(suffix: str) -> bytes:
    """A whole file of few weights, so that damage meets its structure."""
    content = {"model": dict(_small_model().state_dict()), "__author__": "somebody"}
    if suffix == "pkl":
        return pickle.dumps(_as_arrays(content), protocol=2)
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=suffix == "pth")
    return file.getvalue()


SUFFIXES = ["pth", "legacy.pth", "pkl"]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999])
def test_truncated(share, suffix, load, tmp_path):
    data = _small_file(suffix)
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(data[: int(len(data) * share)])
    assert "cannot be read" in load(str(path))


OTHERS = {
    "JPEG": b"\xff\xd8\xff\xe0\x00\x10JFIF\x00",
    "text": b"import os; os.mkdir('ran')\n",
    "zeros": bytes(1000),
    "other zip": b"PK\x05\x06" + bytes(18),
    "page of an error": b"<html><body>404 Not Found</body></html>",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("case", OTHERS)
def test_a_file_of_something_else(case, suffix, load, tmp_path):
    (tmp_path / f"other.{suffix}").write_bytes(OTHERS[case])
    assert "cannot be read" in load(str(tmp_path / f"other.{suffix}"))


HUGE = {
    "array of a terabyte": Calls(np.ndarray, (1 << 37,), np.dtype("f8")),
    "array of negative size": Calls(np.ndarray, (-1,)),
    "array of objects": Calls(np.ndarray, (3,), np.dtype("O")),
    "bytes that cannot be": Calls(bytearray, 1 << 62),
    "array of a type with fields": Calls(np.ndarray, (2,), np.dtype([("a", "O")])),
}


@pytest.mark.parametrize("case", HUGE)
def test_sizes_that_a_pkl_claims(case, load, tmp_path):
    assert load(_pickled(tmp_path / "huge.pkl", {"model": {"x": HUGE[case]}})) is not None


# Opcodes that claim more than follows: text, bytes, a number, a frame, a memo.
CLAIMS = {"text": b"\x8d", "bytes": b"\x8e", "frame": b"\x95", "bytearray": b"\x96"}


@pytest.mark.parametrize("size", [1 << 31, 1 << 40, (1 << 63) - 1], ids=["2G", "1T", "max"])
@pytest.mark.parametrize("opcode", CLAIMS)
def test_lengths_that_a_pkl_claims(opcode, size, load, tmp_path):
    path = tmp_path / "claim.pkl"
    path.write_bytes(b"\x80\x05" + CLAIMS[opcode] + size.to_bytes(8, "little") + b"x.")
    assert "cannot be read" in load(str(path))


@pytest.mark.parametrize("opcode", [b"r\xff\xff\xff\x7f", b"p2147483647\n"])
def test_places_that_a_pkl_asks_for(opcode, load, tmp_path):
    (tmp_path / "memo.pkl").write_bytes(b"\x80\x02}" + opcode + b".")
    assert "cannot be read" in load(str(tmp_path / "memo.pkl"))


def test_a_compressed_pth_is_a_bomb(load, tmp_path):
    with zipfile.ZipFile(io.BytesIO(_small_file("pth"))) as source:
        records = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as f:
        for name, value in records.items():
            f.writestr(name, value if "data/0" not in name else bytes(1 << 24))
    assert "compress" in load(str(tmp_path / "bomb.pth"))


def test_an_address_with_dots(load):
    line = load("https://127.0.0.1:9/../../elsewhere/model.pth")
    assert "must not contain '..'" in line


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_random_damage(suffix, tmp_path_factory):
    """Of a file for the model that it is loaded into: what is not refused must be unchanged.

    Only .pth of today has checksums; of the others, wrong numbers can come from a damaged file.
    """
    path = tmp_path_factory.mktemp("damage") / f"damaged.{suffix}"
    expected = _small_model().state_dict()
    lines = []

    def feed_one(changed):
        path.write_bytes(changed)
        model = _small_model()
        for value in model.state_dict().values():
            value.fill_(7)
        checkpointer = Checkpointer(model, str(path.parent))
        lines.append(feed("weights", path.name, lambda: checkpointer.load(str(path))))
        if lines[-1] is None and suffix == "pth":
            actual = model.state_dict()
            assert all(torch.equal(actual[k], v) for k, v in expected.items())

    feed_one(_small_file(suffix))
    assert lines == [None]
    feed_damaged(_small_file(suffix), feed_one)
    assert sum(line is not None for line in lines) > 10


def test_random_damage_of_safetensors(tmp_path):
    """The format of timm's files; nothing but the converter reads it."""
    save = pytest.importorskip("safetensors.torch", reason="optional").save
    data = save({"conv1.weight": torch.arange(6.0).view(2, 3), "count": torch.tensor([3])})
    path, target = tmp_path / "damaged.safetensors", tmp_path / "out.pth"

    def feed_one(changed):
        path.write_bytes(changed)
        assert feed("weights", path.name, lambda: convert(str(path), str(target))) is not None
        assert not list(tmp_path.glob("out*"))

    feed_damaged(data, feed_one)
    for size in (0, 4, 8, len(data) // 2, len(data) - 1):
        feed_one(data[:size])
    for claim in (1 << 20, 1 << 40, (1 << 64) - 1):  # bytes of the header
        feed_one(claim.to_bytes(8, "little") + data[8:])


@pytest.mark.parametrize("count", [7, 10**6, 1 << 40, -1])
def test_tensors_that_an_old_pth_claims(count, load, tmp_path):
    """The 6 values of the file are said to be ``count``, in a number of 8 bytes (LONG1)."""
    data = _small_file("legacy.pth")
    assert b"cpuq\x08K\x06" in data
    number = b"\x8a\x08" + count.to_bytes(8, "little", signed=True)
    changed = data.replace(b"cpuq\x08K\x06", b"cpuq\x08" + number, 1)
    assert changed != data
    (tmp_path / "claim.pth").write_bytes(changed)
    assert "cannot be read" in load(str(tmp_path / "claim.pth"))


def test_tensors_of_an_old_pth_may_share_their_values(tmp_path):
    weight = torch.arange(1000.0)
    content = {str(i): weight for i in range(20)}
    torch.save(content, tmp_path / "tied.pth", _use_new_zipfile_serialization=False)
    assert (tmp_path / "tied.pth").stat().st_size < 10_000
    loaded = safe_pickle.load_torch(str(tmp_path / "tied.pth"))
    assert all(torch.equal(v, weight) for v in loaded.values()) and len(loaded) == 20


@pytest.fixture
def load_proposals(tiny_data, tmp_path, monkeypatch):
    """Builds the training data with a file of proposals, as training does."""
    monkeypatch.chdir(tmp_path)
    options = tiny.opts(MODEL__LOAD_PROPOSALS=True, DATASETS__TEST="()")
    options += ["DATASETS.PROPOSAL_FILES_TRAIN", "('proposals.pkl',)"]
    cfg = load_config(tiny.CONFIG, options)

    def function(data: bytes):
        (tmp_path / "proposals.pkl").write_bytes(data)
        line = feed("proposals", "proposals.pkl", lambda: Trainer._train_dicts(cfg))
        assert not (tmp_path / "ran").exists()
        return line

    return function


def _proposals():
    ids = list(range(1, 13))
    boxes = [np.array([[1, 2, 20, 30], [0, 0, 9, 9]], np.float32) for _ in ids]
    return {"ids": ids, "boxes": boxes, "objectness_logits": [b[:, 0] for b in boxes]}


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("case", [c for c in evils() if c != "torch.load"])
def test_evil_proposals(case, protocol, load_proposals):
    for content in (evils()[case], {**_proposals(), "boxes": [evils()[case]] * 12}):
        assert load_proposals(pickle.dumps(content, protocol=protocol)) is not None


@pytest.mark.parametrize("case", OTHERS)
def test_proposals_of_something_else(case, load_proposals):
    assert "cannot be read" in load_proposals(OTHERS[case])


def test_random_damage_of_proposals(load_proposals):
    data = pickle.dumps(_proposals(), protocol=2)
    assert load_proposals(data) is None
    feed_damaged(data, load_proposals)
    for size in (0, 1, len(data) // 2, len(data) - 1):
        assert "cannot be read" in load_proposals(data[:size])
