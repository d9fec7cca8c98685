"""Tests at fixed numbers of runs: decisions, runs that are still needed, error rates."""

import json
from pathlib import Path

import numpy as np
import pytest

from refbn_d2.errors import UserError
from refbn_d2.evaluation.interval import Verdict
from refbn_d2.evaluation.runs import Run
from refbn_d2.evaluation.sequential import Plan, next_look, review
from tests.evaluation import generated
from tests.evaluation.simulated import comparison

PLAN = Plan(max_seeds=12, margin=1.0)
BN = [30.0, 30.4, 29.7, 30.2, 29.9, 30.1, 30.3, 29.8, 30.0, 30.2, 29.6, 30.1]
FAR = [x + 9 for x in reversed(BN)]  # decided at once
NEAR = [x + 0.8 for x in reversed(BN)]  # takes all looks with these looks' small levels


@pytest.mark.parametrize(
    "most, looks",
    [(2, (2,)), (3, (3,)), (4, (4,)), (5, (3, 5)), (8, (4, 8)), (10, (3, 5, 10)), (12, (3, 6, 12))],
)
def test_looks_are_fixed_and_spend_five_percent(most, looks):
    plan = Plan(most)
    assert plan.looks == looks
    assert sum(plan.alpha(k) for k in looks) == pytest.approx(0.05)
    assert all(plan.alpha(k) > 0 for k in looks)


def test_early_looks_spend_little():
    # 0.05 (k / 12)^2 at 3, 6 and 12.
    assert [PLAN.alpha(k) for k in PLAN.looks] == pytest.approx([0.003125, 0.009375, 0.0375])


@pytest.mark.parametrize("changes", [{"max_seeds": 1}, {"margin": 0.0}, {"margin": float("nan")}])
def test_bad_plans_are_refused(changes):
    with pytest.raises(UserError, match=next(iter(changes)).replace("_", "-")):
        Plan(**changes)


def test_what_is_decided_needs_no_more_runs():
    progress = review(comparison({"BN": BN[:3], "Far": FAR[:3], "Near": NEAR[:3]}), PLAN)
    assert progress.decided["Far"].verdict is Verdict.BETTER
    assert progress.decided["Far"].runs == 3
    assert progress.open == ["Near"] and not progress.finished
    assert progress.wanted == 6 and progress.runs_left == 6  # three of BN, three of Near
    assert progress.lines[0].startswith("▲ Far against BN, box AP: better after 3 runs per norm")
    assert "undecided" in progress.lines[1] and "With 6 runs" in progress.lines[1]


def test_runs_between_looks_change_nothing():
    early = review(comparison({"BN": BN[:3], "Near": NEAR[:3]}, 0.0), PLAN)
    later = review(comparison({"BN": BN[:5], "Near": NEAR[:4]}, 0.0), PLAN)
    assert later.lines == early.lines
    assert (early.runs_left, later.runs_left) == (6, 3)


def test_a_decision_stays():
    # Better after three runs; what later runs say does not take it back.
    away = FAR[:3] + [x - 20 for x in BN[3:]]
    progress = review(comparison({"BN": BN, "Away": away}), PLAN)
    assert progress.finished and progress.decided["Away"].runs == 3
    assert progress.decided["Away"].verdict is Verdict.BETTER


def test_equal_norms_end_as_practically_the_same():
    progress = review(comparison({"BN": BN, "Same": BN[::-1]}), PLAN)
    assert progress.finished and progress.open == []
    assert progress.decided["Same"].verdict is Verdict.SAME
    assert "within ±1" in progress.lines[0]


def test_the_last_look_ends_it():
    wild = [x + (9 if n % 2 else -9) for n, x in enumerate(BN)]
    progress = review(comparison({"BN": BN, "Wild": wild}), PLAN)
    assert progress.finished and progress.open == ["Wild"]
    assert progress.wanted == 0 and progress.runs_left == 0
    assert "undecided after 12 runs" in progress.lines[0]


def test_norms_that_do_not_differ_are_rarely_told_apart():
    rng = np.random.default_rng(0)
    false = 0
    for n in range(150):
        norms = {name: rng.normal(30, 1.5, 12) for name in ("BN", "Other")}
        decided = review(comparison(norms, 0.3, seed=n, iou_types=["bbox"]), PLAN).decided
        false += any(d.verdict in (Verdict.BETTER, Verdict.WORSE) for d in decided.values())
    assert false <= 0.08 * 150  # 20 % if one looks after every run


def test_before_the_first_look_no_file_is_read():
    runs = [Run("BN", 1, Path("a.json")), Run("X", 1, Path("b.json"), error="not started")]
    progress = next_look(runs, Path("none.json"), PLAN)
    assert not progress.finished
    assert progress.wanted == 3 and progress.runs_left == 2 + 3
    assert progress.decided == {}


def test_next_look_from_files(tmp_path):
    content = generated.ground_truth(images=12)
    truth = tmp_path / "gt.json"
    truth.write_text(json.dumps(content))
    runs = []
    for seed in (10, 9, 2):  # the lowest seeds count, whatever the order of the files
        for name, found in (("BN", 0.1), ("X", 0.95)):
            path = tmp_path / f"{name}{seed}.json"
            path.write_text(json.dumps(generated.detections(content, found, seed=seed)))
            runs.append(Run(name, seed, path))
    progress = next_look(runs, truth, Plan(3, 1.0), resamples=20)
    assert progress.finished and list(progress.decided) == ["X"]
    assert progress.decided["X"].verdict is Verdict.BETTER
