"""Intervals, compared with a simple bootstrap, textbook cases and simulation."""

import hotcoco
import numpy as np
import pytest
from scipy import special, stats

from refbn_d2.errors import UserError
from refbn_d2.evaluation.ap import METRICS, evaluate
from refbn_d2.evaluation.inputs import load_ground_truth
from refbn_d2.evaluation.interval import (
    Difference,
    Spread,
    Verdict,
    difference,
    half_samples,
    moderated,
    seeds_needed,
)
from tests.evaluation import generated


def duplicated(content, results, draw):
    """The data set of the drawn images, one copy for each time that an image was drawn."""
    images, annotations, detections = [], [], []
    for copy, key in enumerate(draw):
        image = next(i for i in content["images"] if i["id"] == key)
        images.append({**image, "id": copy + 1})
        for a in content["annotations"]:
            if a["image_id"] == key:
                annotations.append({**a, "id": len(annotations) + 1, "image_id": copy + 1})
        detections += [{**r, "image_id": copy + 1} for r in results if r["image_id"] == key]
    return {**content, "images": images, "annotations": annotations}, detections


def test_standard_error_is_that_of_a_naive_bootstrap(write):
    content = generated.ground_truth(images=50, categories=1, seed=4)
    models = [
        generated.detections(content, found=0.55, seed=8),
        generated.detections(content, found=0.75, seed=9),
    ]
    content["annotations"] = [
        {k: v for k, v in a.items() if k != "segmentation"} for a in content["annotations"]
    ]
    models = [[{k: v for k, v in r.items() if k != "segmentation"} for r in m] for m in models]
    ids = [i["id"] for i in content["images"]]

    rng = np.random.default_rng(0)
    naive = []
    for _ in range(150):
        draw = rng.choice(ids, len(ids))
        ap = [generated.reference(*duplicated(content, m, draw), "bbox").stats[0] for m in models]
        naive.append(100 * (ap[1] - ap[0]))
    naive = np.std(naive, ddof=1)

    gt = load_ground_truth(write(content), ["bbox"])
    halves = half_samples(ids, 1000, seed=0)
    scores = [evaluate(gt, m, "bbox", halves) for m in models]
    base, other = ([np.array([s.table["AP"]]), s.replicates[None, :, 0]] for s in scores)
    ours = difference(base[0], other[0], base[1], other[1], len(ids)).se_images
    # The naive one itself is uncertain by 6 %; both differ in second order on few images.
    assert ours == pytest.approx(naive, rel=0.15)

    scorers = []
    for m in models:
        scorers.append(hotcoco.COCOeval(gt.coco, gt.coco.load_res(m), "bbox"))
        scorers[-1].evaluate()
    theirs = 100 * hotcoco.compare(*scorers, n_bootstrap=1000, seed=0)["ci"]["AP"]["std_err"]
    # Why hotcoco's own interval is not used. If this fails, it counts repeated images by now.
    assert theirs < 0.85 * naive
    assert theirs * np.sqrt(np.e - 1) == pytest.approx(ours, rel=0.12)


def test_halves_are_halves_without_repetition_and_reproducible():
    halves = half_samples(range(1, 12), 50, seed=3)
    assert len(halves) == 50
    assert all(len(set(h)) == 5 and set(h) <= set(range(1, 12)) for h in halves)
    assert halves == half_samples(range(11, 0, -1), 50, seed=3)
    assert halves != half_samples(range(1, 12), 50, seed=4)


@pytest.mark.parametrize(
    "ids, resamples, seed, words",
    [([1, 2], 1, 0, "resamples 1"), ([1, 2], -5, 0, "resamples -5"), ([1], 9, 0, "1 image"),
     ([1, 2], 9, -1, "seed -1"), ([1, 2], 10**9, 0, "1000000000: use at most 100000")],
)  # fmt: skip
def test_halves_refuse(ids, resamples, seed, words):
    with pytest.raises(UserError, match=words):
        half_samples(ids, resamples, seed)


@pytest.mark.parametrize("images", [40, 41])
def test_variance_of_a_mean_is_the_textbook_one(images):
    # The mean over images is a statistic whose standard error is known.
    rng = np.random.default_rng(images)
    a, b = rng.normal(50, 9, images), rng.normal(53, 9, images)
    halves = np.array(half_samples(range(images), 20_000, seed=1))
    found = difference(
        a.mean(keepdims=True), b.mean(keepdims=True),
        a[halves].mean(1)[None], b[halves].mean(1)[None], images,
    )  # fmt: skip
    low, high = stats.ttest_rel(b, a).confidence_interval()
    assert found.delta == pytest.approx((b - a).mean())
    assert found.checkpoint_interval() == pytest.approx((low, high), rel=0.02, abs=0.05)


def test_clusters_are_drawn_whole_and_count_as_units():
    # Five frames of each video, and videos of several lengths: the t-test is of their means.
    rng = np.random.default_rng(3)
    video = rng.permutation(np.repeat(np.arange(40), 5))
    halves = half_samples(range(200), 8000, 0, video.tolist())
    assert all(len(h) == 100 and len(set(video[h])) == 20 for h in halves)
    shift = rng.normal(3, 5, 40)
    a = rng.normal(50, 9, 200)
    b = a + shift[video] + rng.normal(0, 1, 200)
    found = difference(
        a.mean(keepdims=True), b.mean(keepdims=True),
        a[halves].mean(1)[None], b[halves].mean(1)[None], 40,
    )  # fmt: skip
    means = [(b - a)[video == v].mean() for v in range(40)]
    low, high = stats.ttest_1samp(means, 0).confidence_interval()
    assert found.checkpoint_interval() == pytest.approx((low, high), rel=0.03, abs=0.05)


def test_clusters_of_one_image_are_images():
    ids = list(range(3, 40))
    assert half_samples(ids, 20, 5, [f"video {i}" for i in ids]) == half_samples(ids, 20, 5)


def flat(*norms):
    """Replicates without any image noise."""
    return [np.repeat(x[:, None], 10, axis=1) for x in norms]


def test_equally_many_runs_without_image_noise_are_students_t_test():
    a, b = np.array([36.1, 36.9, 36.4]), np.array([37.9, 36.8, 37.2])
    found = difference(a, b, *flat(a, b), 100)
    expected = stats.ttest_ind(b, a)
    interval = expected.confidence_interval()
    assert found.p == pytest.approx(expected.pvalue)
    assert found.ci95 == pytest.approx((interval.low, interval.high))
    assert found.se_images == pytest.approx(0, abs=1e-12)


def test_paired_runs_without_image_noise_are_the_paired_t_test():
    rng = np.random.default_rng(2)
    common = rng.normal(0, 3, 6)
    a, b = 30 + common + rng.normal(0, 0.5, 6), 31 + common + rng.normal(0, 0.5, 6)
    found = difference(a, b, *flat(a, b), 100, paired=True)
    expected = stats.ttest_rel(b, a)
    interval = expected.confidence_interval()
    assert found.p == pytest.approx(expected.pvalue)
    assert found.ci95 == pytest.approx((interval.low, interval.high))
    # What the seeds have in common is no longer in the interval.
    apart = difference(a, b, *flat(a, b), 100)
    assert found.se < 0.5 * apart.se and found.delta == apart.delta
    assert found.reach_with() == pytest.approx((interval.high - interval.low) / 2)


def test_what_an_image_does_to_both_runs_of_a_seed_is_not_the_runs_own():
    # Each seed does something to each image, the same in both norms: no difference is due to it.
    rng = np.random.default_rng(3)
    by_seed = rng.normal(30, 1, (6, 200))
    ap = [30 + rng.normal(0, 0.1, 6) for _ in range(2)]
    paired = difference(*ap, by_seed, by_seed + 1, 400, paired=True)
    assert paired.run_by_image == pytest.approx(0, abs=1e-12)
    assert difference(*ap, by_seed, by_seed + 1, 400).run_by_image > 0.1


def test_seeds_needed_of_paired_runs_by_simulation():
    k = seeds_needed(0.5, paired=True)  # differences with a standard deviation of 0.5 sqrt(2)
    rng = np.random.default_rng(7)

    def power(runs):
        differences = rng.normal(0.5, 0.5 * np.sqrt(2), (20_000, runs))
        return (stats.ttest_1samp(differences, 0, axis=1).pvalue < 0.05).mean()

    assert power(k) > 0.79 and power(k - 1) < 0.81


def test_unequally_many_runs_keep_their_own_spreads():
    a, b = np.array([36.1, 36.9, 36.4]), np.array([37.9, 36.8, 37.2, 38.0, 37.5])
    found = difference(a, b, *flat(a, b), 100)
    expected = stats.ttest_ind(b, a, equal_var=False)  # Welch's
    interval = expected.confidence_interval()
    assert found.p == pytest.approx(expected.pvalue)
    assert found.ci95 == pytest.approx((interval.low, interval.high))


def test_seeds_that_agree_by_chance_do_not_shorten_the_interval():
    rng = np.random.default_rng(5)
    a, b = rng.normal(30, 2, (3, 400)), rng.normal(31, 2, (3, 400))
    same = difference(np.full(3, 30.0), np.full(3, 31.0), a, b, 200)
    images_alone = 1.96 * same.se_images
    assert same.ci95[0] < 1 - images_alone and same.ci95[1] > 1 + images_alone


def test_noise_of_the_images_is_not_counted_twice():
    # Seeds that differ only by what each image did to each run: their spread is the images' own.
    rng = np.random.default_rng(6)
    replicates = [rng.normal(30, 1, (2000, 50)) for _ in range(2)]
    ap = [30 + rng.normal(0, 1, 2000) for _ in range(2)]
    found = difference(*ap, *replicates, 200)
    expected = np.sqrt(2 / 2000)
    half = (found.ci95[1] - found.ci95[0]) / 2
    assert half == pytest.approx(1.96 * expected, rel=0.1)


@pytest.mark.parametrize("counts", [(1, 1), (4, 1), (1, 4)])
def test_a_single_run_gives_no_interval_on_the_norm(counts):
    rng = np.random.default_rng(1)
    ap = [rng.normal(30 + 20 * n, 0.1, k) for n, k in enumerate(counts)]
    found = difference(*ap, *(rng.normal(30, 0.1, (k, 50)) for k in counts), 100)
    assert found.ci95 is None and np.isnan(found.p) and np.isnan(found.se_seeds)
    assert found.runs_needed() is None
    assert found.verdict() is Verdict.UNDECIDED
    low, high = found.checkpoint_interval()
    assert low < found.delta < high


@pytest.mark.parametrize("runs", [1, 3])
def test_equal_results_have_a_zero_interval_and_p_one(runs):
    rng = np.random.default_rng(0)
    ap, replicates = rng.normal(31, 1, runs), rng.normal(31, 1, (runs, 50))
    found = difference(ap, ap[::-1], replicates, replicates[::-1], 80)
    assert (found.delta, found.ci95, found.p) == (0, (0, 0), 1)
    assert found.verdict() is Verdict.SAME


def test_what_cannot_be_measured_is_nan():
    nothing = np.full((1, 9), np.nan)
    found = difference(np.array([np.nan]), np.array([np.nan]), nothing, nothing, 80)
    assert np.isnan(found.delta) and found.ci95 is None and np.isnan(found.p)
    once = np.array([[3.0] + [np.nan] * 8])
    found = difference(np.array([3.0]), np.array([4.0]), once, once + 1, 80)
    assert found.delta == 1 and found.ci95 is None and found.checkpoint_interval() is None
    assert found.verdict() is Verdict.UNDECIDED


def test_moderated_spreads_solve_smyths_equations():
    # Smyth 2004, section 6.2; a large total_df, so that d0 can be read off.
    variances, df = [0.08, 2.5, 0.3, 16.1, 1.7], [2, 2, 2, 4, 2]
    found = moderated([Spread(v, d) for v, d in zip(variances, df)], total_df=1e9)
    d0 = found[0].df - 2
    e = [np.log(v) - special.digamma(d / 2) + np.log(d / 2) for v, d in zip(variances, df)]
    trigamma = [special.polygamma(1, d / 2) for d in df]
    assert special.polygamma(1, d0 / 2) == pytest.approx(np.var(e, ddof=1) - np.mean(trigamma))
    s0 = np.exp(np.mean(e) + special.digamma(d0 / 2) - np.log(d0 / 2))
    expected = [max(v, (d0 * s0 + d * v) / (d0 + d)) for v, d in zip(variances, df)]
    assert [s.variance for s in found] == pytest.approx(expected)
    assert 0 < sum(e > v for e, v in zip(expected, variances)) < 5  # raised, but for large ones
    assert [s.df for s in found] == pytest.approx([d + d0 for d in df])


def test_spreads_that_agree_become_one():
    found = moderated([Spread(v, 4) for v in (0.9, 1.0, 1.1, 1.05)], total_df=16)
    assert found[0].variance == found[1].variance > 1.0
    assert found[2].variance == max(1.1, found[0].variance)
    assert [s.df for s in found] == [16] * 4


def test_two_spreads_and_dead_norms_are_left_alone():
    two = [Spread(1.0, 4), Spread(9.0, 4)]
    assert moderated(two, 8) == two
    dead = [*two, Spread(0.0, 4)]
    assert moderated(dead, 12) == dead


def test_moderation_recovers_the_distribution_of_spreads():
    # True variances scatter as 2 * 10 / chi^2(10): d0 is 10 and s0^2 is 2.
    rng = np.random.default_rng(2)
    true = 2 * 10 / rng.chisquare(10, 20_000)
    seen = [Spread(t * c / 4, 4) for t, c in zip(true, rng.chisquare(4, 20_000))]
    found = moderated(seen, 80_000)
    low = int(np.argmin([s.variance for s in seen]))
    assert found[low].df == pytest.approx(14, rel=0.05)
    assert found[low].variance == pytest.approx((10 * 2 + 4 * seen[low].variance) / 14, rel=0.05)


def test_verdicts():
    def made(delta, se, df=1e9, comparisons=1):
        return Difference(delta, 0.0, 0.0, se**2, df, 100, (5, 5), Spread(1, 8), comparisons)

    assert made(1.97, 1).verdict() is Verdict.BETTER
    assert made(-1.97, 1).verdict() is Verdict.WORSE
    assert made(1.95, 1).verdict() is Verdict.UNDECIDED
    # Six comparisons: Bonferroni's quantile is 2.638.
    assert made(2.63, 1, comparisons=6).verdict() is Verdict.UNDECIDED
    assert made(2.65, 1, comparisons=6).verdict() is Verdict.BETTER
    # The 90 % interval is 1.645 standard errors each way.
    assert made(0.0, 0.303).verdict(0.5) is Verdict.SAME
    assert made(0.0, 0.305).verdict(0.5) is Verdict.UNDECIDED
    assert made(0.4, 0.1).verdict(0.5) is Verdict.BETTER


@pytest.mark.parametrize("comparisons", [1, 7])
def test_adjusted_p_agrees_with_the_simultaneous_interval(comparisons):
    rng = np.random.default_rng(4)
    outside = []
    for _ in range(200):
        a, b = rng.normal(30, 1, 3), rng.normal(32, 1, 3)
        found = difference(
            a, b, rng.normal(30, 1, (3, 20)), rng.normal(30, 1, (3, 20)), 50, None, comparisons
        )
        low, high = found.interval(simultaneous=True)
        outside.append(low > 0 or high < 0)
        assert outside[-1] == (found.p_adjusted < 0.05)
        assert (found.p < 0.05) == (not found.ci95[0] <= 0 <= found.ci95[1])
    assert 0 < sum(outside) < 200


@pytest.mark.parametrize("spread", [0.3, 1.0])
def test_seeds_needed_by_simulation(spread):
    k = seeds_needed(spread)
    rng = np.random.default_rng(7)

    def power(runs):
        a = rng.normal(0, spread, (20_000, runs))
        b = rng.normal(0.5, spread, (20_000, runs))
        return (stats.ttest_ind(a, b, axis=1).pvalue < 0.05).mean()

    assert power(k) > 0.79
    assert power(k - 1) < 0.81


def test_seeds_needed_counts_what_images_leave():
    k = seeds_needed(1.0, 1.0, image_se=0.25)
    assert k > seeds_needed(1.0, 1.0)
    rng = np.random.default_rng(7)
    image = rng.normal(0, 0.25, 20_000)
    a, b = rng.normal(0, 1, (20_000, k)), rng.normal(1, 1, (20_000, k)) + image[:, None]
    se = np.sqrt((a.var(1, ddof=1) + b.var(1, ddof=1)) / k + 0.25**2)
    assert (abs(b.mean(1) - a.mean(1)) > 1.96 * se).mean() == pytest.approx(0.82, abs=0.03)
    # 2.8 standard errors of 0.36 are more than 1: no number of runs helps.
    assert seeds_needed(1.0, 1.0, image_se=0.36) is None


def test_runs_needed_is_a_range():
    # The quickstart's: 2 degrees of freedom leave 64 to 9,361 of 237.
    d = Difference(0.5, 0.0, 0.0, 1.0, 2, 100, (2, 2), Spread(3.765, 2))
    needed = d.runs_needed()
    assert needed.estimate == pytest.approx(237, abs=3)
    assert (needed.low, needed.high) == (pytest.approx(65, abs=2), pytest.approx(9350, rel=0.02))


@pytest.mark.parametrize("counts", [(4, 4), (3, 5)])
def test_expected_length_with_more_data(counts):
    rng = np.random.default_rng(2)
    ap = [rng.normal(30, 2, k) for k in counts]
    d = difference(*ap, *(rng.normal(30, 0.7, (k, 200)) for k in counts), 400, comparisons=3)
    low, high = d.interval(simultaneous=True)
    assert d.reach_with() == pytest.approx((high - low) / 2)
    tail = 1 - 0.05 / 6  # Bonferroni's for three
    only_images = stats.norm.ppf(tail) * np.sqrt(d.images)
    assert d.reach_with(more_runs=1e6) == pytest.approx(only_images, rel=0.01, abs=0.01)
    only_seeds = stats.t.ppf(tail, d.spread.df) * d.se_seeds
    assert d.reach_with(more_images=1e6) == pytest.approx(only_seeds, rel=0.01)


def test_seeds_needed_ends():
    assert seeds_needed(0.0) == 2
    assert seeds_needed(1e-6) == 2
    assert seeds_needed(1000.0) is None


def test_metrics_are_detectron2s(gt):
    assert tuple(evaluate(gt, [], "bbox").table) == METRICS
