"""A run that is killed and resumed ends with the same weights as without a stop, bit for bit."""

from pathlib import Path

import kills
import pytest
import tiny
import torch

from refbn_d2.config import load_config
from refbn_d2.engine import Trainer

# One checkpoint lies at an iteration before which the reference is taken again.
OPTIONS = {"SOLVER__MAX_ITER": 8, "SOLVER__CHECKPOINT_PERIOD": 3, "TEST__EVAL_PERIOD": 0}


def _kill_after_checkpoint(data: Path, output: Path, **options) -> None:
    process = kills.start(data, output, False, **{**OPTIONS, **options})
    kills.wait_for(output / "last_checkpoint", process)
    process.kill()
    process.join()
    assert process.exitcode == -9, (output / "output.txt").read_text()[-2000:]
    assert not (output / "model_final.pth").exists()


def test_ten_kills_change_nothing(tiny_data, tmp_path):
    """Anywhere, and in the middle of writing a file: weights, optimizer, metrics, reference."""
    found = kills.kill_and_resume(tiny_data, tmp_path, 10)
    assert found["kills"] == 10 and found["in a write"] > 0 and found["ends"] > 0


@pytest.mark.parametrize(
    "workers, options",
    [
        (0, {"MODEL__RESNETS__NORM": "BN"}),
        (0, {"MODEL__RESNETS__NORM": "MABN"}),
        (2, {}),  # not even the number of workers matters
        (0, {"MODEL__REFBN__REFERENCE__REFRESH_PERIOD": 3}),
    ],
    ids=["BN", "MABN", "workers", "refreshed"],
)
def test_killed_and_resumed_equals_uninterrupted(tiny_data, tmp_path, workers, options):
    whole, output = tmp_path / "whole", tmp_path / "resumed"
    kills.finish(tiny_data, whole, False, **{**OPTIONS, **options})
    options["DATALOADER__NUM_WORKERS"] = workers
    _kill_after_checkpoint(tiny_data, output, **options)
    kills.finish(tiny_data, output, True, **{**OPTIONS, **options})
    kills.assert_same_run(output, whole)


def test_without_a_seed_the_run_resumes_with_the_one_it_drew(tiny_data, tmp_path):
    options = {
        **OPTIONS,
        "SEED": -1,
        "MODEL__WEIGHTS": tmp_path / "start.pth",
        # A sampler that draws a seed itself where detectron2 does not give it one.
        "DATALOADER__SAMPLER_TRAIN": "RepeatFactorTrainingSampler",
        "DATALOADER__REPEAT_THRESHOLD": 0.9,
    }
    model = Trainer.build_model(load_config(tiny.CONFIG, tiny.opts()))
    torch.save({"model": model.state_dict()}, options["MODEL__WEIGHTS"])
    output, whole = tmp_path / "resumed", tmp_path / "whole"
    _kill_after_checkpoint(tiny_data, output, **options)
    first = kills.load(output / "model_0000002.pth")
    options["SEED"] = first["trainer"]["hooks"]["ExactResume"]["seed"]
    kills.finish(tiny_data, output, True, **{**options, "SEED": -1})
    kills.finish(tiny_data, whole, False, **options)
    kills.assert_same_run(output, whole)
