"""Run folders: which runs are found, and which are refused."""

import json

import pytest

from refbn_d2.errors import UserError
from refbn_d2.evaluation.runs import common_ground_truth, find_runs, training_log

GOOD = {"name": "BN", "seed": 1, "status": "finished", "gt": "a.json"}


def make(folder, where="one", results=True, **changes):
    entry = {k: v for k, v in {**GOOD, **changes}.items() if v is not ...}
    (folder / where / "inference").mkdir(parents=True)
    (folder / where / "run.json").write_text(json.dumps(entry))
    if results:
        (folder / where / "inference" / "coco_instances_results.json").write_text("[]")


@pytest.mark.parametrize(
    "changes, condition",
    [
        ({}, ""),
        ({"ims_per_batch": 1, "iid": 1.0}, "1 image a batch, i.i.d."),
        ({"ims_per_batch": 4, "iid": True}, "4 images a batch, i.i.d."),
        ({"iid": 0.25}, "grouping 0.75"),
        ({"grouping": 1}, "grouping 1"),
        ({"grouping": 0}, "i.i.d."),
        ({"protocol": "A, frozen", "ims_per_batch": 2}, "A, frozen, 2 images a batch"),
    ],
)
def test_condition_in_words(tmp_path, changes, condition):
    make(tmp_path, **changes)
    (run,) = find_runs(tmp_path)
    assert run.condition == condition and run.error == ""


def test_unfinished_runs_say_why(tmp_path):
    make(tmp_path, "a", status="failed", error="loss is NaN")
    make(tmp_path, "b", seed=2, status="running")
    make(tmp_path, "c", seed=3, results=False)
    errors = [run.error for run in find_runs(tmp_path)]
    assert errors[:2] == ["failed: loss is NaN", "running"]
    assert errors[2].startswith("finished, but has no inference")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"name": ...}, "needs a name"),
        ({"seed": ...}, "a run needs a seed"),
        ({"seed": "x"}, "seed 'x'"),
        ({"seed": True}, "seed True"),
        ({"ims_per_batch": 1.5}, "ims_per_batch 1.5"),
        ({"ims_per_batch": -3}, "ims_per_batch -3 is not a number of images"),
        ({"ims_per_batch": 10**400}, "ims_per_batch 10+ is not a number of images"),
        ({"grouping": 2}, "grouping 2 is not within"),
        ({"iid": "yes"}, "iid 'yes'"),
        ({"gt": 4}, "gt 4"),
        ({"protocol": 4}, "protocol 4"),
    ],
)
def test_bad_run_json(tmp_path, changes, words):
    make(tmp_path, **changes)
    with pytest.raises(UserError, match=words) as error:
        find_runs(tmp_path)
    assert "run.json" in str(error.value)


def test_no_runs_and_two_alike(tmp_path):
    with pytest.raises(UserError, match="no folder below it has a run.json"):
        find_runs(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        find_runs(tmp_path / "none")
    make(tmp_path, "a")
    make(tmp_path, "b")
    with pytest.raises(UserError, match="both BN with seed 1"):
        find_runs(tmp_path)


def test_runs_must_share_their_ground_truth(tmp_path, monkeypatch):
    make(tmp_path, "a")
    make(tmp_path, "b", seed=2)
    with pytest.raises(UserError, match="a.json: no such file, .* or give it with --gt"):
        common_ground_truth(find_runs(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").touch()
    assert str(common_ground_truth(find_runs(tmp_path))) == "a.json"
    make(tmp_path, "c", seed=3, gt="b.json")
    with pytest.raises(UserError, match="different ground truths: a.json, b.json"):
        common_ground_truth(find_runs(tmp_path))


def test_training_log_skips_what_is_cut_off(tmp_path):
    log = tmp_path / "metrics.json"
    log.write_text('{"iteration": 3, "total_loss": 1.5, "bbox/AP": NaN}\n[1]\n{"iteration": 4, "to')
    assert training_log(log) == {"total_loss": [[3, 1.5]], "bbox/AP": [], "segm/AP": []}
