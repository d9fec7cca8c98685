"""Seeds are added where a comparison is not decided, up to a maximum, also after a stop."""

import functools
import json
import random

import pytest
import tiny
import yaml

from refbn_d2.errors import UserError
from refbn_d2.evaluation.sequential import Plan
from refbn_d2.experiments import until_decided
from refbn_d2.experiments.matrix import load_matrix
from refbn_d2.experiments.training import Training
from refbn_d2.experiments.until_decided import run_until_decided

BASE = str(tiny.ROOT / "configs/Quick/Base-mask_rcnn_R_50_C4_quick.yaml")
PLAN = Plan(max_seeds=6, margin=1.0)  # looks at 3 and 6 runs


@pytest.fixture
def specs(tmp_path):
    path = tmp_path / "matrix.yaml"
    norms = ["BN", "RefBN", {"name": "broken", "norm": "GN8"}]
    content = {"DETECTOR": BASE, "NORMS": norms, "SEEDS": [7], "IMS_PER_BATCH": [2]}
    path.write_text(yaml.safe_dump(content))
    return load_matrix(str(path))


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Trains nothing: detections that are good by chance, and for the broken norm always bad."""
    gt = tiny.write(tmp_path / "data") / "coco/annotations/instances_val2017.json"
    content = json.loads(gt.read_text())
    annotations = content["annotations"]
    content["categories"] = content["categories"][:3]
    gt.write_text(json.dumps(content))
    quick = functools.partial(until_decided.next_look, resamples=10)
    monkeypatch.setattr(until_decided, "next_look", quick)

    def run(specs):
        records = []
        for spec in specs:
            folder = tmp_path / "out" / spec.folder
            (folder / "inference").mkdir(parents=True, exist_ok=True)
            rng = random.Random(f"{spec.name}{spec.seed}")
            detections = [
                {
                    "image_id": a["image_id"],
                    "category_id": a["category_id"],
                    "bbox": [
                        x + rng.uniform(0, 1.5) + 100 * (spec.name == "broken") for x in a["bbox"]
                    ],
                    "score": rng.random(),
                }
                for a in annotations
            ]
            results = folder / "inference/coco_instances_results.json"
            if not results.exists():
                run.trained.append((spec.name, spec.seed))
            results.write_text(json.dumps(detections))
            record = {
                **Training(spec).record(),
                "status": "finished",
                "seconds": 60.0,
                "gt": str(gt),
            }
            (folder / "run.json").write_text(json.dumps(record))
            records.append(record)
            if len(run.trained) == run.stop_after:
                raise KeyboardInterrupt
        return records

    run.trained, run.stop_after = [], None
    return run


def test_only_what_is_open_gets_more_seeds(tmp_path, specs, train, capsys):
    progress = run_until_decided(specs, tmp_path / "out", PLAN, "BN", train, jobs=2)
    # The seeds go on from the matrix's, and the broken norm is known to be after three.
    expected = {(n, s) for n in ("BN", "RefBN") for s in range(7, 13)}
    expected |= {("broken", s) for s in (7, 8, 9)}
    assert set(train.trained) == expected and len(train.trained) == len(expected)
    assert progress.finished and progress.decided["broken"].runs == 3
    out = capsys.readouterr().out
    assert "Open: everything. Next look at 3 runs per norm: 9 more." in out
    # Six runs, two at a time, a minute each.
    assert "Open: RefBN. Next look at 6 runs per norm: 6 more, about 0:03:00" in out


@pytest.mark.parametrize("stop_after", [1, 12])
def test_interrupted_it_goes_on_to_the_same_end(tmp_path, specs, train, stop_after):
    train.stop_after = stop_after
    with pytest.raises(KeyboardInterrupt):
        run_until_decided(specs, tmp_path / "out", PLAN, "BN", train, jobs=1)
    train.stop_after = None
    progress = run_until_decided(specs, tmp_path / "out", PLAN, "BN", train, jobs=1)
    assert len(train.trained) == 15 and len(set(train.trained)) == 15
    assert progress.finished and set(progress.decided) >= {"broken"}
    done = list(train.trained)
    again = run_until_decided(specs, tmp_path / "out", PLAN, "BN", train, jobs=1)
    assert train.trained == done and again.lines == progress.lines


def test_looks_stay_as_they_were_fixed(tmp_path, specs, train):
    train.stop_after = 2
    with pytest.raises(KeyboardInterrupt):
        run_until_decided(specs, tmp_path / "out", PLAN, "BN", train, jobs=1)
    with pytest.raises(UserError, match="margin.*the looks are fixed before the first run"):
        run_until_decided(specs, tmp_path / "out", Plan(6, 2.0), "BN", train, jobs=1)
    assert len(train.trained) == 2


@pytest.mark.parametrize(
    "baseline, output, message",
    [
        ("none", "out", "--baseline none: no such name; there are BN, RefBN, broken"),
        ("BN", "file/out", "file/out cannot be written: Not a directory; choose another folder"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_run(
    tmp_path, specs, train, baseline, output, message
):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=message):
        run_until_decided(specs, tmp_path / output, PLAN, baseline, train, jobs=1)
    assert train.trained == [] and not (tmp_path / "out").exists()


def test_a_run_that_fails_ends_it(tmp_path, specs):
    def fails(specs):
        return [{"status": "failed"} for _ in specs]

    with pytest.raises(UserError, match="9 of 9 runs did not finish"):
        run_until_decided(specs, tmp_path / "out", PLAN, "BN", fails, jobs=1)
