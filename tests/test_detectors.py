"""RefBN in each place where a detector has a NORM key: capture, train, evaluate, save, resume."""

import json

import detectors
import pytest
import torch

from refbn_d2.statistics.reference import reference_layers


@pytest.fixture(scope="module")
def data(tiny_data):
    detectors.write_segmentation(tiny_data)


@pytest.mark.parametrize("name", detectors.DETECTORS)
def test_a_detector_trains_evaluates_and_resumes(name, data, tmp_path, caplog):
    detector = detectors.DETECTORS[name]
    trainer = detectors.train(detector, tmp_path, max_iter=2)
    layers = reference_layers(trainer.model)
    counts = detectors.count_layers(trainer.model, detector)
    assert all(counts.values()), counts
    assert sum(counts.values()) == len(layers)  # there is no other place
    # Each layer took its reference in the pass before training, none from its first batch.
    assert set(json.loads((tmp_path / "reference.json").read_text())["layers"]) == set(layers)
    assert "No reference was captured" not in caplog.text
    references = {n: (m.ref_mean.clone(), m.ref_var.clone()) for n, m in layers.items()}

    resumed = detectors.train(detector, tmp_path, max_iter=3, resume=True)
    assert resumed.start_iter == 2
    checkpoint = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert checkpoint["iteration"] == 2
    for n, (mean, var) in references.items():  # the paper's reference stays
        assert torch.equal(checkpoint["model"][f"{n}.ref_mean"], mean), n
        assert torch.equal(checkpoint["model"][f"{n}.ref_var"], var), n
