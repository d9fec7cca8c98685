"""Pickles of arrays load; any other content of a pickle is not run."""

import argparse
import io
import os
import pathlib
import pickle
import types
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import tiny
import torch

from refbn_d2.config import load_config
from refbn_d2.engine import Trainer
from refbn_d2.errors import UserError
from refbn_d2.weights import safe_pickle


class _Evil:
    def __init__(self, path):
        self._path = str(path)

    def __reduce__(self):
        return os.mkdir, (self._path,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_what_a_weights_file_holds_loads_as_from_pickle(protocol):
    content = OrderedDict(
        weight=np.arange(6, dtype=np.float32).reshape(2, 3),
        fortran=np.asfortranarray(np.eye(3)),
        count=np.int64(3),
        text="name",
        raw=b"\x00\xff",
        nested={"list": [1, 2.5, None, (True, "x")]},
    )
    data = pickle.dumps(content, protocol=protocol)
    loaded, expected = safe_pickle.load(io.BytesIO(data)), pickle.loads(data)
    assert type(loaded) is OrderedDict and list(loaded) == list(expected)
    for key in ("weight", "fortran"):
        assert loaded[key].dtype == expected[key].dtype
        assert np.array_equal(loaded[key], expected[key])
    assert {k: loaded[k] for k in ("count", "text", "raw", "nested")} == {
        k: expected[k] for k in ("count", "text", "raw", "nested")
    }


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_call_in_a_pickle_is_refused_and_not_run(tmp_path, protocol):
    target = tmp_path / "made by the pickle"
    data = pickle.dumps({"model": _Evil(target)}, protocol=protocol)
    with pytest.raises(pickle.UnpicklingError, match="mkdir"):
        safe_pickle.load(io.BytesIO(data))
    assert not target.exists()
    pickle.loads(data)  # the pickle is as evil as it should be
    assert target.exists()


def _model_and_checkpointer(tmp_path):
    cfg = load_config(tiny.CONFIG, tiny.opts(OUTPUT_DIR=tmp_path))
    model = Trainer.build_model(cfg)
    return model, Trainer.build_checkpointer(cfg, model)


def test_an_evil_weights_file_is_one_line(tmp_path):
    target, path = tmp_path / "made", tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps({"model": _Evil(target), "__author__": "me"}))
    _, checkpointer = _model_and_checkpointer(tmp_path)
    with pytest.raises(UserError, match="evil.pkl.*cannot be read.*mkdir"):
        checkpointer.resume_or_load(str(path), resume=False)
    assert not target.exists()


def test_a_model_zoo_file_still_loads(tmp_path):
    saved, _ = _model_and_checkpointer(tmp_path)
    arrays = {k: v.numpy() for k, v in saved.state_dict().items()}
    path = tmp_path / "zoo.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "zoo"}, protocol=2))
    model, checkpointer = _model_and_checkpointer(tmp_path)
    with torch.no_grad():
        next(model.parameters()).fill_(7)
    checkpointer.resume_or_load(str(path), resume=False)
    for a, b in zip(model.state_dict().values(), saved.state_dict().values()):
        assert torch.equal(a, b)


def _state(dtype, state):
    """A pickle of an array whose type is given this state."""

    class DType:
        def __reduce__(self):
            return np.dtype, (dtype,), state

    class Array:
        def __reduce__(self):
            empty = np.zeros(0).__reduce__()
            return empty[0], empty[1], (1, (1,), DType(), False, b"\0" * 8)

    return Array()


@pytest.mark.parametrize(
    "dtype, state",
    [
        ("f8", (3, "<", None, None, None, -1, -1, 63)),  # flags: holds objects, needs Python
        ("f8", (3, "<", None, ("a",), {"a": (np.dtype("f8"), 0)}, 8, 1, 0)),
        ("f8", (3, "x", None, None, None, -1, -1, 0)),
        ("S8", (3, "|", None, None, None, 1 << 40, 1, 0)),
        ("f8", (3, "<", (np.dtype("f4"), (2,)), None, None, -1, -1, 0)),
        ("f8", 7),
    ],
    ids=["flags", "fields", "order", "size", "subarray", "number"],
)
@pytest.mark.parametrize("way", ["pkl", "pth"])
def test_a_type_gets_no_state_but_its_own(dtype, state, way):
    file = io.BytesIO()
    array = _state(dtype, state)
    pickle.dump(array, file, protocol=2) if way == "pkl" else torch.save(array, file)
    file.seek(0)
    with pytest.raises(
        pickle.UnpicklingError, match="state that NumPy never writes|not of numbers"
    ):
        safe_pickle.load(file) if way == "pkl" else safe_pickle.load_torch(file)


def test_numbers_of_the_other_byte_order_are_what_they_were():
    array = np.arange(5, dtype=">i4")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        loaded = safe_pickle.load(io.BytesIO(pickle.dumps(array, protocol)))
        assert np.array_equal(loaded, array)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_an_empty_array_is_one(protocol):
    data = pickle.dumps({"x": np.zeros((0, 3), np.float32), "y": b""}, protocol)
    loaded = safe_pickle.load(io.BytesIO(data))
    assert loaded["x"].shape == (0, 3) and loaded["x"].dtype == np.float32 and loaded["y"] == b""


def test_an_array_is_one_to_whoever_handles_it():
    """Data loaders pickle what they hold for their processes."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    loaded = safe_pickle.load(io.BytesIO(pickle.dumps(array, 2)))
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(loaded, protocol))
        assert type(again) is np.ndarray and np.array_equal(again, array)


def test_what_scripts_keep_beside_the_weights_is_read_over(tmp_path):
    content = {
        "model": {"weight": torch.randn(3)},
        "args": argparse.Namespace(lr=0.1, nested=types.SimpleNamespace(path=pathlib.Path("x"))),
        "best": np.float64(0.5),
        "seed": np.arange(3, dtype=np.uint32),
    }
    for legacy in (False, True):
        torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
        loaded = safe_pickle.load_torch(str(tmp_path / "a.pth"))
        assert torch.equal(loaded["model"]["weight"], content["model"]["weight"])
        assert loaded["best"] == 0.5 and np.array_equal(loaded["seed"], content["seed"])
        assert not isinstance(loaded["args"], argparse.Namespace)


def test_no_bit_of_an_archive_can_change_a_tensor():
    """Each record, name, length, flag and checksum of the zip file; torch.load checks few."""
    weights = {"a.weight": torch.randn(4, 3), "b": torch.arange(5)}
    file = io.BytesIO()
    torch.save({"model": weights}, file)
    data = file.getvalue()
    bits = np.random.default_rng(0).choice(8 * len(data), 3000, replace=False)
    refused = 0
    for bit in bits.tolist():
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            loaded = safe_pickle.load_torch(io.BytesIO(changed))["model"]
        except Exception:  # each is reported on one line, see Checkpointer.load
            refused += 1
            continue
        assert list(loaded) == list(weights)
        assert all(torch.equal(loaded[k], v) for k, v in weights.items())
    assert refused > len(bits) / 2  # the rest is padding and dates


def test_an_entry_that_claims_to_be_a_folder_is_read_as_a_record():
    """torch.load would leave the memory of its tensor as it finds it."""
    file = io.BytesIO()
    torch.save({"a": torch.arange(1000.0)}, file)
    with zipfile.ZipFile(file) as f:
        names = f.namelist()
    data = bytearray(file.getvalue())
    # The attributes are 38 bytes into an entry of the directory at the end, the name 46.
    name = next(n for n in names if n.endswith("data/0")).encode()
    data[data.rindex(name) - 46 + 38] ^= 0x10
    loaded = safe_pickle.load_torch(io.BytesIO(data))
    assert torch.equal(loaded["a"], torch.arange(1000.0))
    with pytest.raises(zipfile.BadZipFile, match="CRC-32"):
        data[data.index(np.arange(1000.0, dtype="f4").tobytes()) + 7] ^= 1
        safe_pickle.load_torch(io.BytesIO(data))


def test_records_that_overlap_are_refused():
    """A small archive of many records that share their bytes would fill the memory."""
    file = io.BytesIO()
    torch.save({"a": torch.arange(1000.0)}, file)
    data = bytearray(file.getvalue())
    with zipfile.ZipFile(file) as f:
        entry = next(e for e in f.infolist() if e.filename.endswith("data.pkl"))
    place = data.rindex(entry.filename.encode()) - 46
    for field in (20, 24):  # the two sizes
        data[place + field : place + field + 4] = (len(data) - 200).to_bytes(4, "little")
    with pytest.raises((pickle.UnpicklingError, zipfile.BadZipFile)):
        safe_pickle.load_torch(io.BytesIO(data))
