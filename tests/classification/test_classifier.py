"""Classifiers as detectron2 models: inputs, losses, logged errors, memory format."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from detectron2.modeling import build_model
from torch.utils.data import default_collate

from refbn_d2 import capture_reference
from refbn_d2.classification import TorchvisionClassifier
from refbn_d2.classification.classifier import collate, right
from refbn_d2.config import load_config
from refbn_d2.statistics.reference import reference_layers


def _model(**changes) -> TorchvisionClassifier:
    options = {
        "MODEL.META_ARCHITECTURE": "TorchvisionClassifier",
        "MODEL.DEVICE": "cpu",
        "MODEL.CLASSIFIER.NETWORK": "resnet18",
        "MODEL.CLASSIFIER.NORM": "RefBN",
        "MODEL.CLASSIFIER.NUM_CLASSES": "7",
        "MODEL.PIXEL_MEAN": "[10.0, 20.0, 30.0]",
        "MODEL.PIXEL_STD": "[2.0, 4.0, 8.0]",
        **{f"MODEL.{k}": str(v) for k, v in changes.items()},
    }
    torch.manual_seed(0)
    return build_model(load_config("", [x for pair in options.items() for x in pair]))


def _batch(n: int = 4, channels: int = 3):
    images = torch.randint(0, 256, (n, channels, 24, 24), dtype=torch.uint8)
    return [{"image": x, "label": k % 7, "image_id": k} for k, x in enumerate(images)]


def test_names_are_torchvisions_behind_a_prefix():
    expected = {f"network.{k}" for k in torchvision.models.resnet18().state_dict()}
    assert set(_model(**{"CLASSIFIER.NORM": "BN"}).state_dict()) == expected


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_scores(smoothing):
    model = _model(**{"CLASSIFIER.NORM": "GN", "CLASSIFIER.LABEL_SMOOTHING": smoothing})
    batch = _batch()
    pixels = torch.stack([d["image"] for d in batch]).double()
    mean, std = torch.tensor([10.0, 20, 30]), torch.tensor([2.0, 4, 8])
    pixels = (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        scores = model.network(pixels.float())
        listed, stacked = model(batch)["loss_cls"], model(default_collate(batch))["loss_cls"]
        found = torch.stack([o["scores"] for o in model.eval()(batch)])
    # Cross entropy by its definition.
    target = F.one_hot(torch.arange(4), 7) * (1 - smoothing) + smoothing / 7
    expected = -(target * scores.log_softmax(1)).sum(1).mean()
    assert torch.allclose(listed, expected, rtol=1e-5) and torch.equal(listed, stacked)
    assert torch.allclose(found, scores, atol=1e-5)


def test_it_counts_what_was_right_in_training_alone():
    model = _model()
    batch = _batch(6)
    capture_reference(model, batch)
    assert all(m.has_reference for m in reference_layers(model).values())
    assert model.counts.tolist() == [0, 0, 0]  # the reference batch is not trained on
    model(batch)
    model(batch)
    model.eval()(batch)
    assert model.counts[0] == 12
    assert "counts" not in model.state_dict()


def test_right_by_hand():
    scores = torch.tensor([[9.0, 8, 7, 6, 5, 4], [4, 5, 6, 7, 8, 9], [9, 8, 7, 6, 5, 4]])
    assert right(scores, torch.tensor([0, 4, 5])).tolist() == [3, 1, 2]
    assert right(scores[:, :2], torch.tensor([0, 0, 1])).tolist() == [3, 1, 3]


def test_channels_last_is_a_layout_and_nothing_else():
    plain, last = _model(), _model(**{"CLASSIFIER.CHANNELS_LAST": True})
    weight = last.network.layer1[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    seen = []
    last.network.conv1.register_forward_hook(lambda m, x, y: seen.append(x[0]))
    batch = _batch()
    losses = [m(batch)["loss_cls"].item() for m in (plain, last)]
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_grey_images_get_the_channels_of_the_pixel_mean():
    model, grey = _model(), _batch(channels=1)
    color = [{**d, "image": d["image"].expand(3, -1, -1)} for d in grey]
    with torch.no_grad():
        assert torch.equal(model(grey)["loss_cls"], model(color)["loss_cls"])


def test_collate_takes_what_a_model_needs():
    batch = [{**d, "file_name": "x"} for d in _batch(2)]
    assert set(collate(batch)) == {"image", "label"}
    assert collate(collate(batch)) is not None and collate(batch)["image"].shape == (2, 3, 24, 24)
    assert set(collate([{"image": d["image"]} for d in batch])) == {"image"}
