"""The sentences of a report about two norms follow from the intervals."""

import json
from dataclasses import replace

import numpy as np
import pytest

from refbn_d2.errors import UserError
from refbn_d2.evaluation.comparison import NormRuns, compare
from refbn_d2.evaluation.interval import Verdict
from refbn_d2.evaluation.runs import Run, named_results
from refbn_d2.evaluation.text import MARKS, model_text, seed_lines, verdict_text, verdicts
from tests.evaluation import generated
from tests.evaluation.simulated import comparison

BN = [30.0, 30.4, 29.7, 30.2, 29.9]


def only(made):
    (verdict,) = verdicts(made)
    return verdict


@pytest.mark.parametrize(
    "other, mark, words",
    [
        ([x + 3 for x in BN], "▲", "X is better than BN in box AP: +3.00 [+"),
        ([x - 3 for x in BN], "▼", "X is worse than BN in box AP: −3.00 [−"),
        ([x + 0.01 for x in BN], "≈", "X and BN are practically the same in box AP: +0.01, and"),
        ([20.0, 40, 25, 35, 31], "?", "Undecided whether X differs from BN in box AP: +0.16 [−"),
    ],
)
def test_one_sentence_a_verdict(other, mark, words):
    found = only(comparison({"BN": BN, "X": other}, margin=0.6))
    assert found["mark"] == mark and found["text"].startswith(words)


def test_undecided_says_what_is_excluded():
    made = comparison({"BN": BN, "X": [20.0, 40, 25, 35, 31]})
    low, high = made.primary_difference("X").ci95
    assert f"Effects beyond −{-low:.1f} and +{high:.1f} AP are excluded." in only(made)["text"]


def test_a_difference_below_the_margin_is_called_small():
    made = comparison({"BN": BN, "X": [x + 1 for x in BN]}, margin=5.0)
    assert only(made)["mark"] == "▲"
    assert "smaller than the margin of 5 AP" in only(made)["text"]


@pytest.mark.parametrize(
    "runs, who",
    [
        ((1, 1), "each has one run. These two"),
        ((1, 5), "BN has one run"),
        ((5, 1), "X has one run"),
    ],
)
@pytest.mark.parametrize("shift", [-9, 0.0, 9])
def test_one_run_never_decides(runs, who, shift):
    made = comparison({"BN": BN[: runs[0]], "X": [x + shift for x in BN[: runs[1]]]})
    text = only(made)["text"]
    assert only(made)["mark"] == "?" and only(made)["verdict"] == "undecided"
    assert who in text and "is better" not in text and "is worse" not in text
    assert ("checkpoints differ" in text) == (shift != 0)
    assert seed_lines(made) == [
        f"X ({runs[1]} against {runs[0]} runs): unknown, because one run shows no variance over "
        "seeds."
    ]


def test_the_mark_agrees_with_the_printed_interval():
    rng = np.random.default_rng(3)
    for n in range(60):
        norms = {k: rng.normal(30 + shift, 1, 4) for k, shift in zip("ABCD", (0, 0, 1.5, 3))}
        made = comparison(norms, seed=n)
        for label, verdict in zip("BCD", verdicts(made)):
            d = made.primary_difference(label)
            low, high = d.interval(simultaneous=True)
            assert (verdict["mark"] in "▲▼") == (low > 0 or high < 0) == (d.p_adjusted < 0.05)


def test_the_primary_ap_decides():
    # Masks have half of the boxes' AP and of their difference.
    norms = {"BN": BN, "X": [x + 1.2 for x in BN[::-1]]}
    assert only(comparison(norms, margin=0.9))["mark"] == "▲"
    masks = comparison(norms, primary="segm", margin=0.9)
    assert masks.primary_difference("X").delta == pytest.approx(0.6)
    assert "in mask AP: +0.60" in only(masks)["text"]


def test_more_comparisons_make_longer_intervals():
    one = comparison({"BN": BN, "X": [x + 1 for x in BN]}, 0.0)
    two = comparison({"BN": BN, "X": [x + 1 for x in BN], "Y": BN[::-1]}, 0.0)
    assert one.primary_difference("X").ci95 == pytest.approx(two.primary_difference("X").ci95)
    low, high = two.primary_difference("X").interval(simultaneous=True)
    assert (low, high) == pytest.approx(two.primary_difference("X").interval(0.975))
    assert "the 2 comparisons" in model_text(two) and "Bonferroni" not in model_text(one)


def test_budget_says_what_pays():
    noisy_seeds = comparison({"BN": [28.0, 33, 30, 26], "X": [29.0, 25, 34, 31]}, 0.1)
    assert "more runs help more" in seed_lines(noisy_seeds)[0]
    # Image noise that all runs of a norm share.
    made = comparison({"BN": BN, "X": BN[::-1]}, 0.0)
    shared = np.random.default_rng(0).normal(0, 3, (40, 6))
    for score in made.groups["X"].scores["bbox"]:
        score.replicates = score.replicates + shared
    made = made.with_first_runs(5)
    assert "more images help more" in seed_lines(made)[0]
    assert "no number of runs suffices with this many images" in seed_lines(made)[0]


def test_an_interval_ends_at_the_largest_possible_difference():
    """As the study's FrozenBN, with two runs in thirteen comparisons: the t-interval is +-1,100."""
    norms = {f"N{n}": [30.0, 31, 29, 30, 31] for n in range(12)}
    made = comparison({"BN": [23.0, 24, 22, 25, 23], "Frozen": [2.0, 18.0], **norms}, 0.0)
    assert made.primary_difference("Frozen").interval(simultaneous=True) == (-100, 100)
    text = verdict_text(made, "Frozen")
    assert text.endswith(
        "[−100.00, +100.00]. These runs exclude no difference; train more of them."
    )


def test_nothing_to_measure_is_said():
    made = comparison({"BN": [float("nan")] * 2, "X": [float("nan")] * 2})
    assert only(made)["mark"] == "?"
    assert only(made)["text"] == "X and BN have no box AP to compare."
    assert seed_lines(made) == ["X (2 against 2 runs): unknown."]


def test_marks_are_four_different_signs():
    assert set(MARKS) == set(Verdict) and len(set(MARKS.values())) == 4


@pytest.fixture(scope="module")
def files(write):
    content = generated.ground_truth(images=12)
    for n, image in enumerate(content["images"]):
        image["video"] = f"v{n // 3}"
    results = {k: generated.detections(content, 0.6, seed=n) for n, k in enumerate("abcd")}
    return {"gt": write(content), **{k: write(v) for k, v in results.items()}}


def test_clusters_come_from_a_field_of_the_images(files):
    runs = named_results([f"A={files['a']},{files['b']}", f"B={files['c']},{files['d']}"])
    made = compare(runs, files["gt"], ["bbox"], None, 20, 0, cluster="video")
    assert made.units == 4 and made.primary_difference("B").units == 4
    assert "4 clusters (video) of the 12 images" in model_text(made)
    plain = compare(runs, files["gt"], ["bbox"], None, 20, 0)
    assert plain.units == 12 and "use --cluster video" in model_text(plain)
    with pytest.raises(UserError, match="no field 'group'"):
        compare(runs, files["gt"], ["bbox"], None, 20, 0, cluster="group")


def test_a_shared_pretraining_is_said(files):
    runs = named_results([f"A={files['a']},{files['b']}", f"B={files['c']},{files['d']}"])
    assert compare(runs, files["gt"], ["bbox"], None, 20, 0).warnings == []
    shared = [replace(run, pretraining_seed=7) for run in runs]
    (sentence,) = compare(shared, files["gt"], ["bbox"], None, 20, 0).warnings
    assert "(seed 7)" in sentence and "do not cover the choice of the pretraining" in sentence


def test_runs_are_paired_by_known_seeds_from_five_on(files):
    def runs(name, seeds, known=True):
        return NormRuns(name, [Run(name, s, files["a"], seed_is_known=known) for s in seeds])

    five = runs("A", [1, 2, 3, 4, 5])
    assert runs("B", [1, 2, 3, 4, 5]).paired_with(five)
    assert not runs("B", [1, 2, 3, 4, 6]).paired_with(five)
    assert not runs("B", [1, 2, 3, 4, 5], known=False).paired_with(five)
    assert not runs("B", [1, 2, 3, 4]).paired_with(runs("A", [1, 2, 3, 4]))


def test_one_result_under_two_names(files, write):
    copies = [write(files[k].read_text()) for k in "ab"]
    runs = named_results([f"A={files['a']},{files['b']}", f"B={copies[1]},{copies[0]}"])
    made = compare(runs, files["gt"], ["bbox"], None, 20, 0)
    d = made.primary_difference("B")
    assert (d.delta, d.ci95, d.p, d.p_adjusted) == (0, (0, 0), 1, 1)
    assert only(made)["mark"] == "≈" and "are the same results" in only(made)["text"]
    assert len(made.warnings) == 2 and str(copies[0]) in made.warnings[1]


def test_norms_that_found_nothing_right_are_not_the_same(files, write):
    """Each run has another detection that hits no object."""
    image, category = 1, json.loads(files["a"].read_text())[0]["category_id"]
    junk = [
        write([{"image_id": image, "category_id": category, "score": 0.5, "bbox": [n, 0, 1, 1]}])
        for n in range(6)
    ]
    for count in (1, 3):
        runs = named_results(
            [f"A={','.join(map(str, junk[:count]))}", f"B={','.join(map(str, junk[3:][:count]))}"]
        )
        made = compare(runs, files["gt"], ["bbox"], None, 20, 0)
        assert made.groups["A"].mean("bbox", "AP") == made.groups["B"].mean("bbox", "AP") == 0
        assert made.verdict("B") is Verdict.UNDECIDED and only(made)["mark"] != "≈"


def test_a_copy_is_no_second_seed(files, write):
    copy = write(files["a"].read_text())
    runs = named_results([f"A={files['a']},{copy}", f"B={files['b']}"])
    with pytest.raises(UserError, match="is a copy of") as error:
        compare(runs, files["gt"], ["bbox"], None, 20, 0)
    assert "\n" not in str(error.value) and str(copy) in str(error.value)


def test_two_models_that_find_nothing_are_two_seeds(files, write):
    empty = [write(json.loads("[]")) for _ in range(2)]
    runs = named_results([f"A={empty[0]},{empty[1]}", f"B={files['a']},{files['b']}"])
    made = compare(runs, files["gt"], ["bbox"], None, 20, 0)
    # Neither is called a copy of the other.
    assert made.warnings == [f"A, seed {n}: no detections at all." for n in (1, 2)]
    assert made.groups["A"].mean("bbox", "AP") == 0
