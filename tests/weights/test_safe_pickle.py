"""Pickles of arrays load; anything else in a pickle does not run."""

import io
import os
import pickle
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
