"""TrainLoader gives the same data as detectron2's loader, from any iteration on."""

import random

import numpy as np
import pytest
import tiny
import torch
from detectron2.data import DatasetMapper, build_detection_train_loader
from detectron2.data.samplers import TrainingSampler

from refbn_d2.config import load_config
from refbn_d2.data.loader import TrainLoader
from refbn_d2.engine import Trainer


def _config(**changes):
    return load_config(tiny.CONFIG, tiny.opts(**changes))


def _take(loader, n):
    return [batch for batch, _ in zip(loader, range(n))]


def _assert_same(actual, expected):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected):
        assert [d["image_id"] for d in a] == [d["image_id"] for d in b]
        assert all(torch.equal(x["image"], y["image"]) for x, y in zip(a, b))


def test_batches_are_detectron2s(tiny_data):
    """Without random augmentation: the same images in the same batches, both orientations apart."""
    cfg = _config(INPUT__RANDOM_FLIP="none", INPUT__MIN_SIZE_TRAIN=(64,), SEED=3)
    loader = Trainer.build_train_loader(cfg)
    upstream = build_detection_train_loader(
        Trainer._train_dicts(cfg),
        mapper=DatasetMapper(cfg, True),
        # Release 0.6 of detectron2 does not derive the sampler's seed from SEED.
        sampler=loader._sampler(loader._dataset, loader.seed),
        total_batch_size=2,
    )
    ours = _take(loader, 12)
    _assert_same(ours, _take(upstream, 12))
    assert len({len({d["width"] > d["height"] for d in batch}) for batch in ours}) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_start_skips_batches_and_changes_nothing_else(tiny_data, workers):
    expected = _take(Trainer.build_train_loader(_config()), 9)
    loader = Trainer.build_train_loader(_config(DATALOADER__NUM_WORKERS=workers))
    loader.start = 4
    _assert_same(_take(loader, 5), expected[4:])


def test_augmentation_differs_between_epochs_and_seeds(tiny_data):
    def images(seed):
        loader = Trainer.build_train_loader(_config(SEED=seed))
        seen = {}
        for d in (d for batch in _take(loader, 18) for d in batch):
            seen.setdefault(d["image_id"], []).append(d["image"].numpy().tobytes())
        return seen

    one, two = images(1), images(2)
    # Two scales, flipped or not: in three epochs hardly any image looks the same each time.
    assert sum(len(set(views)) > 1 for views in one.values()) >= 6
    assert one != two


def test_loading_leaves_the_random_state_alone(tiny_data):
    """Or the number of workers would decide what the model draws."""
    iterator = iter(Trainer.build_train_loader(_config()))
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    next(iterator)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]


def test_skipping_loads_no_image():
    loaded = []

    def mapper(d):
        loaded.append(d["image_id"])
        return d

    dicts = [{"image_id": n, "width": 2, "height": 1 + n % 3} for n in range(20)]
    loader = TrainLoader(
        dicts, lambda dataset, seed: TrainingSampler(20, seed=seed), mapper, 3, True, 0, 5
    )
    loader.start = 1000
    (batch,) = _take(loader, 1)
    assert len(loaded) <= 6  # the batch, and at most the one after it
    assert [d["image_id"] for d in batch] == loaded[:3]
