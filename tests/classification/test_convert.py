"""A classifier's weights start a detector: all of its backbone and conv5, norms as they are."""

import tiny
import torch
from detectron2.modeling import build_model

from refbn_d2.classification import ImageClassifier
from refbn_d2.classification.convert import detector_weights
from refbn_d2.config import load_config

CLASSIFIER = str(tiny.ROOT / "configs/Quick/classifier_refbn.yaml")


def _models():
    names = ("STEM_OUT_CHANNELS", "RES2_OUT_CHANNELS", "WIDTH_PER_GROUP")
    width = {f"MODEL.RESNETS.{n}": tiny.SMALL[f"MODEL.RESNETS.{n}"] for n in names}
    options = [str(x) for pair in {**width, "MODEL.DEVICE": "cpu"}.items() for x in pair]
    return (
        build_model(load_config(CLASSIFIER, options)),
        build_model(load_config(tiny.CONFIG, tiny.opts())),
    )


def test_the_detector_gets_every_residual_network_weight():
    classifier, detector = _models()
    for value in classifier.state_dict().values():
        if value.is_floating_point():
            value.normal_()
    weights = detector_weights(classifier.state_dict())
    keys = detector.load_state_dict(weights, strict=False)
    assert not keys.unexpected_keys
    expected = {k for k in detector.state_dict() if "backbone." in k or ".res5." in k}
    assert set(weights) == expected
    state = detector.state_dict()
    for n in ("backbone.stem.conv1.norm.ref_mean", "backbone.res4.1.conv2.weight"):
        assert torch.equal(state[n], classifier.state_dict()[n])
    a, b = state["roi_heads.res5.0.conv1.norm.ref_var"], "backbone.res5.0.conv1.norm.ref_var"
    assert torch.equal(a, classifier.state_dict()[b])


def test_the_classifier_learns_from_labels_and_scores_images():
    classifier, _ = _models()
    assert isinstance(classifier, ImageClassifier)
    batch = [{"image": torch.full((3, 64, 64), 60.0 * n), "label": n} for n in range(3)]
    loss = classifier.train()(batch)["loss_cls"]
    with torch.no_grad():
        scores = torch.stack([o["scores"] for o in classifier.eval()(batch)])
    assert loss.ndim == 0 and loss.requires_grad and scores.shape == (3, 10)
    # The last norm of each block starts at zero: a block is the identity.
    assert all(
        m.conv3.norm.weight.abs().max() == 0 and m.conv2.norm.weight.min() == 1
        for m in classifier.modules()
        if hasattr(m, "conv3")
    )
    # Sixty is the mean of the pixels; of a black image nothing is left but the difference.
    assert not torch.allclose(scores[0], scores[1])


def test_nothing_of_a_classifier_gives_nothing():
    assert detector_weights({"linear.weight": torch.zeros(1)}) == {}
