"""Learning curves of written metrics.json files: steps, spreads, the table and the figure."""

import json
import math

import pytest
import yaml

from refbn_d2.errors import UserError
from refbn_d2.evaluation.learning_curves import (
    TEST,
    TRAIN,
    figure,
    find_classifier_runs,
    rows,
    steps_to,
)


def write_run(folder, norm, train, test=(), max_iter=400, **changes):
    """A run with a training error every 20 steps and a test error every 100."""
    folder.mkdir(parents=True)
    classifier = {"NORM": norm, "NETWORK": "lenet5", **changes}
    config = {
        "MODEL": {"META_ARCHITECTURE": "TorchvisionClassifier", "CLASSIFIER": classifier},
        "SOLVER": {"MAX_ITER": max_iter, "IMS_PER_BATCH": 64, "BASE_LR": 0.01},
        "DATASETS": {"TRAIN": ["mnist_train"]},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [
        {"iteration": 20 * k + 19, TRAIN: e, "train/top5_error": e / 10, "lr": 1.0}
        for k, e in enumerate(train)
    ]
    steps = [min(100 * k + 99, max_iter) for k in range(len(test))]
    if test and steps[-1] == max_iter - 1:
        steps[-1] = max_iter  # as detectron2 logs the last one
    lines += [
        {"iteration": i, TEST: e, "classification/top5_error": e / 10} for i, e in zip(steps, test)
    ]
    text = "\n".join(map(json.dumps, lines))
    (folder / "metrics.json").write_text(text + '\n{"iteration": 4')  # cut off
    return folder


def test_steps_count_from_one_and_training_is_smoothed(tmp_path):
    train = [50.0] * 10 + [0.0] * 10
    write_run(tmp_path / "a", "BN", train, [9.0, 2.5, 2.0, 1.0])
    ((run,),) = find_classifier_runs([tmp_path]).values()
    assert steps_to(run, TEST, 98) == 300 and steps_to(run, TEST, 99) == 400
    assert math.isinf(steps_to(run, TEST, 99.5))
    # Five points are the mean of 100 steps: 50 % errors are gone from it 5 points after the tenth.
    assert steps_to(run, TRAIN, 98) == 300 and steps_to(run, TRAIN, 70) == 20 * 12
    assert run.curves[TRAIN][0].tolist() == [20, 50] and run.curves[TEST][-1].tolist() == [400, 1]


def test_the_table_has_median_and_range_of_the_seeds(tmp_path):
    for seed, last in enumerate((1.0, 3.0, 1.5)):
        write_run(tmp_path / f"bn{seed}", "BN", [5.0] * 20, [9.0, last + 0.5, last, last])
    write_run(tmp_path / "none", "", [5.0] * 20)
    header, table = rows(find_classifier_runs([tmp_path]), [98])
    table = {row[0]: dict(zip(header, row)) for row in table}
    assert (
        table["BN"]["runs"] == "3" and table["BN"]["test top-1 error (%)"] == "1.50 (1.00 to 3.00)"
    )
    assert table["BN"]["steps to 98 % (test)"] == "200 (200 to not reached)"
    assert table["BN"]["steps to 98 % (train)"] == "not reached"
    assert table["BN"]["test top-5 error (%)"] == "0.15 (0.10 to 0.30)"
    assert table["none"]["train top-1 error (%)"] == "5.00"
    assert table["none"]["test top-1 error (%)"] == "–"


def test_the_figure_has_a_band_a_norm(tmp_path):
    for seed, e in enumerate((4.0, 2.0, 3.0)):
        write_run(tmp_path / f"{seed}", "RefBN", [e] * 20, [e] * 4)
    result = figure(find_classifier_runs([tmp_path]), [98])
    assert len(result.axes) == 2
    for ax in result.axes:
        (band,), line = ax.collections, ax.lines[0]
        assert set(line.get_ydata()) == {3.0}
        values = band.get_paths()[0].vertices[:, 1]
        assert (values.min(), values.max()) == (2.0, 4.0)
    result.savefig(tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size < 300_000


def test_an_interrupted_run_that_repeats_steps_counts_them_once(tmp_path):
    folder = write_run(tmp_path / "a", "BN", [5.0] * 3)
    with open(folder / "metrics.json", "a") as f:
        f.write("\n" + json.dumps({"iteration": 59, TRAIN: 4.0}) + "\n")
    ((run,),) = find_classifier_runs([tmp_path]).values()
    assert run.curves[TRAIN].tolist() == [[20, 5], [40, 5], [60, 4]]


def test_what_cannot_be_compared(tmp_path):
    with pytest.raises(UserError, match="no config.yaml"):
        find_classifier_runs([tmp_path])
    folder = write_run(tmp_path / "a", "BN", [5.0])
    write_run(tmp_path / "b", "BN", [5.0], NETWORK="vgg16_32x32")
    with pytest.raises(UserError, match="/b and .*/a differ in more than norm and seed"):
        find_classifier_runs([tmp_path])
    (folder / "metrics.json").write_text("")
    with pytest.raises(UserError, match="no errors of a classifier"):
        find_classifier_runs([folder])
    (folder / "metrics.json").unlink()
    with pytest.raises(UserError, match="metrics.json: does not exist"):
        find_classifier_runs([folder])
    (folder / "config.yaml").write_text("MODEL: {}")
    with pytest.raises(UserError, match="not the config of a classifier"):
        find_classifier_runs([folder])
