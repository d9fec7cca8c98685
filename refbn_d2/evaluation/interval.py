"""Intervals for a difference of AP. They cover the choice of the images and the training seeds.

The model. The AP of norm X, trained with seed s and measured on the images D, is

    AP(X, s, D) = mu_X + I_X(D) + S_Xs + T_Xs(D)

with independent deviations of mean zero: I_X is the effect of these images on every run of X, S_Xs
the effect of the seed on any images, and T_Xs(D) the additional effect of the seed on these images.
The runs of both norms are scored on the same images, so I is paired. The quantity of interest is
mu_B - mu_A. Its estimate is delta, the difference of the means over seeds. With k_X runs of norm X
its variance is

    V = Var(I_B - I_A) + sum over X in {A, B} of (Var(S_X) + Var(T_X)) / k_X

*Images.* Each resample draws half of the images without replacement and scores all runs on them.
For m of n images the variance of a statistic over such subsets, times m / (n - m), estimates its
variance over data sets. (This is the delete-d jackknife. To first order it equals the bootstrap's
variance, and it is also valid for statistics that are not smooth enough for the bootstrap.) Images
that belong together, such as the frames of a video, are drawn together; m and n are then numbers of
clusters. hotcoco's own ``compare`` is not used: it draws images with replacement but counts each
once. Its subsets have 63 % of the images, and its standard error is 1 / sqrt(e - 1) = 0.76 of the
right one, so its interval is too short.

*Seeds.* The variance of AP over the runs of a norm, s_X^2, estimates Var(S_X) + Var(T_X). If both
norms have the same number of runs k, it is pooled: s^2 = (s_A^2 + s_B^2) / 2 with 2 (k - 1) degrees
of freedom. This is right on average even if the two variances differ. With unequal numbers of runs
pooling would be biased, and each norm keeps its own s_X^2; their sum has the degrees of freedom of
Welch and Satterthwaite. With three or more pooled pairs in a report, each s^2 is moderated by all
of them, as in limma's squeezeVar (Smyth 2004). The assumption is that the true variances are
distributed like s_0^2 d_0 / chi^2(d_0); s_0^2 and d_0 are fitted to the log s^2. Then
(d_0 s_0^2 + d s^2) / (d_0 + d) has d_0 + d degrees of freedom, but at most those of all runs
together. Unlike in limma, an s^2 can only be raised by this and not lowered: a condition whose runs
scatter more than those of the others, such as a norm near divergence, keeps its own variance.

*Common seeds.* Runs of both norms with the same seed share initial weights, the order of the data
and the drawn RoIs. Their APs may be high or low together, so S and T are not independent between
norms. From PAIRED_FROM runs on, such runs are paired, as in the paired t-test: the variance is that
of the differences d_s between the two runs of a seed, s^2 = Var(d_s) / 2 with k - 1 degrees of
freedom, and T is that of the differences, too. This is valid whatever the correlation. It halves
the degrees of freedom, so it shortens the interval only if the correlation is above 0.31 with 5
runs, or 0.58 with 3. Whether runs are paired depends on their number and not on their results,
because the shorter of two intervals would cover too little. docs/evaluation.md has measured
correlations.

*The sum.* The resamples alone estimate Var(T), as the variance of a run about its norm's mean over
runs. Hence Var(T) is not counted twice. Var(T) is known well, so the variance over seeds is never
taken to be less than Var(T), even if the runs happened to agree. The interval is
delta +- t(df) sqrt(V). Let v_1 be the images' part of V, v_2 the seeds' part, and d_1 (number of
images or clusters, less 1) and d_2 their degrees of freedom. Then df is
V / (v_1 / d_1 + v_2 / d_2), the harmonic mean weighted by variance. Satterthwaite's
V^2 / (v_1^2 / d_1 + v_2^2 / d_2) is larger, and its intervals cover too little here: if v_2 is too
small by chance because there are few runs, its few degrees of freedom also have less weight. Where
the variance is pooled, half of Var(T) is counted with v_1, because the images determine it well. By
simulation, intervals would cover too little with all of it in v_1, and be longer than necessary
with none of it.

*One run.* A single run shows no spread over seeds. If a norm has one run, there is no interval for
the norm, only one that treats the checkpoints as given (image sampling alone). To use another
norm's spread would assume that both have the same spread, which one run cannot show.

The interval covers another draw of images (or clusters) from the same source, and another draw of
training seeds. It does not cover another data set, architecture, schedule or learning rate.

dev/check_coverage.py compares the coverage and the length of these choices; docs/evaluation.md has
the results.
"""

import enum
import math
from dataclasses import dataclass, replace
from typing import Any, Dict, Hashable, List, Mapping, Optional, Sequence, Tuple

import numpy as np
from scipy import optimize, special, stats

from ..errors import UserError

__all__ = [
    "CONFIDENCE",
    "EFFECT",
    "LARGEST",
    "MARGIN",
    "PAIRED_FROM",
    "POWER",
    "Difference",
    "RunsNeeded",
    "Spread",
    "Verdict",
    "difference",
    "half_samples",
    "moderated",
    "seeds_needed",
    "shared_spreads",
]

CONFIDENCE = 0.95
POWER = 0.8
EFFECT = 0.5  # AP, the paper's claim
MARGIN = 0.5  # AP; smaller differences count as none in practice
LARGEST = 100.0  # difference of two APs, in percent
MAX_SEEDS = 10_000
MAX_RESAMPLES = 100_000
# Runs of each norm from which those with the same seed are paired. With fewer, the interval would
# be longer unless the correlation is high.
PAIRED_FROM = 5
# Number of comparisons from which spreads are moderated: two are too few to fit a distribution.
_MODERATED_FROM = 3
# Part of Var(T) that gets the degrees of freedom of the images. If all of it did, intervals would
# cover too little.
_KNOWN = 0.5
_NEGLIGIBLE = 1e-5  # of the median variance, as in limma

Interval = Tuple[float, float]


class Verdict(enum.Enum):
    """What an interval says about a norm and the baseline."""

    BETTER = "better"
    WORSE = "worse"
    SAME = "practically the same"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Spread:
    """Variance of AP from run to run of one norm.

    Attributes:
        variance: Variance of one run, in squared percent AP.
        df: Degrees of freedom of this estimate.
    """

    variance: float
    df: float


@dataclass(frozen=True)
class RunsNeeded:
    """Number of runs of each norm that detect an effect; None if no number up to MAX_SEEDS does.

    Attributes:
        estimate: If the spread over seeds is as estimated.
        low, high: If the spread is at the ends of its 95 % interval.
    """

    estimate: Optional[int]
    low: Optional[int]
    high: Optional[int]


@dataclass(frozen=True)
class Difference:
    """Other norm minus baseline for one metric, in percent AP; NaN for what cannot be calculated.

    Attributes:
        delta: Difference of the means over seeds.
        images: Variance of delta from image sampling, which more runs do not reduce.
        run_by_image: Variance of delta that more images or more runs reduce.
        seeds: Variance of delta from training seeds, which more images do not reduce; NaN if a
            norm has one run.
        df: Degrees of freedom of the sum of the three.
        units: Number of images, or of clusters of images, that were drawn.
        runs: Number of runs of the baseline and of the other norm.
        spread: Variance of one run from run to run, or half the variance of the differences of
            paired runs; None if a norm has one run.
        paired: Whether runs with the same seed were paired.
        comparisons: Number of comparisons for which a simultaneous interval holds.
    """

    delta: float = math.nan
    images: float = math.nan
    run_by_image: float = math.nan
    seeds: float = math.nan
    df: float = math.nan
    units: int = 0
    runs: Tuple[int, int] = (0, 0)
    spread: Optional[Spread] = None
    comparisons: int = 1
    paired: bool = False

    @property
    def se(self) -> float:
        """Standard error of delta over images and seeds."""
        return math.sqrt(self.images + self.run_by_image + self.seeds)

    @property
    def se_images(self) -> float:
        """Standard error of delta over images, for these checkpoints."""
        return math.sqrt(self.images + self.run_by_image)

    @property
    def se_seeds(self) -> float:
        """Standard error from training seeds; its square is added to that of ``se_images``."""
        return math.sqrt(self.seeds)

    def interval(
        self, confidence: float = CONFIDENCE, simultaneous: bool = False
    ) -> Optional[Interval]:
        """The interval of the difference of the norms; None if there is none.

        A difference of two APs lies within +-100, so the interval ends there, too.

        Args:
            confidence: Confidence of the interval, or of all simultaneous intervals together.
            simultaneous: Whether to correct for ``comparisons`` (Bonferroni).
        """
        return self._around(self.se, self.df, confidence, simultaneous)

    def checkpoint_interval(
        self, confidence: float = CONFIDENCE, simultaneous: bool = False
    ) -> Optional[Interval]:
        """As ``interval``, for these checkpoints on other images; it does not cover the seeds."""
        return self._around(self.se_images, self.units - 1, confidence, simultaneous)

    def _around(self, se, df, confidence, simultaneous) -> Optional[Interval]:
        if math.isnan(self.delta) or math.isnan(se):
            return None
        if se == 0:
            return self.delta, self.delta
        tail = (1 - confidence) / 2 / (self.comparisons if simultaneous else 1)
        reach = float(-special.stdtrit(df, tail)) * se
        return max(self.delta - reach, -LARGEST), min(self.delta + reach, LARGEST)

    @property
    def ci95(self) -> Optional[Interval]:
        """95 % interval of this difference alone."""
        return self.interval()

    @property
    def p(self) -> float:
        """Two-sided p-value of "no difference between the norms", for this comparison alone."""
        if math.isnan(self.delta) or math.isnan(self.se):
            return math.nan
        if self.se == 0:
            return float(self.delta == 0)
        return float(2 * special.stdtr(self.df, -abs(self.delta) / self.se))

    @property
    def p_adjusted(self) -> float:
        """p corrected by Bonferroni: below 0.05 if the simultaneous 95 % interval excludes 0."""
        return self.p if math.isnan(self.p) else min(1.0, self.p * self.comparisons)

    def verdict(self, margin: float = MARGIN, alpha: float = 1 - CONFIDENCE) -> Verdict:
        """The verdict that follows from the simultaneous intervals.

        Better or worse: 0 is outside the 1 - ``alpha`` interval. Practically the same: the
        1 - 2 ``alpha`` interval lies within +-``margin`` (two one-sided tests).

        Args:
            margin: In percent AP.
            alpha: Probability of any false verdict among the ``comparisons``.
        """
        ends = self.interval(1 - alpha, simultaneous=True)
        inner = self.interval(1 - 2 * alpha, simultaneous=True)
        if ends is None or inner is None:
            return Verdict.UNDECIDED
        if ends[0] > 0:
            return Verdict.BETTER
        if ends[1] < 0:
            return Verdict.WORSE
        return Verdict.SAME if -margin < inner[0] and inner[1] < margin else Verdict.UNDECIDED

    def runs_needed(self, effect: float = EFFECT) -> Optional[RunsNeeded]:
        """Number of runs of each norm that detect ``effect`` on the same number of images.

        None if the spread over seeds is unknown.
        """
        if self.spread is None:
            return None
        variance, df = self.spread.variance, self.spread.df
        image_se = math.sqrt(self.images)
        # The 95 % interval of the variance: df s^2 / sigma^2 has a chi-square distribution.
        tails = (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2
        ends = [variance * df / special.chdtri(df, tail) for tail in tails]
        estimate, low, high = (
            seeds_needed(math.sqrt(v), effect, image_se, self.paired) for v in (variance, *ends)
        )
        return RunsNeeded(estimate, low, high)

    def reach_with(self, more_runs: float = 1, more_images: float = 1) -> float:
        """Expected half-length of the simultaneous 95 % interval with more data.

        Args:
            more_runs, more_images: Factors; 1 for the present number.
        """
        if self.spread is None or self.se == 0:
            return math.nan
        images = self.images / more_images
        run_by_image = self.run_by_image / more_images / more_runs
        run_term = run_by_image + self.seeds / more_runs
        known = _KNOWN * run_by_image if self.runs[0] == self.runs[1] else 0.0
        df_runs = self.spread.df + (more_runs - 1) * sum(self.runs) / (2 if self.paired else 1)
        df = _df([(images + known, more_images * self.units - 1), (run_term - known, df_runs)])
        tail = (1 - CONFIDENCE) / 2 / self.comparisons
        return float(-special.stdtrit(df, tail)) * math.sqrt(images + run_term)

    def as_dict(self) -> Dict[str, Any]:
        """The numbers for report.json."""
        needed = self.runs_needed()
        return {
            "delta": self.delta,
            "ci95": self.ci95,
            "p": self.p,
            "ci95_simultaneous": self.interval(simultaneous=True),
            "ci90_simultaneous": self.interval(2 * CONFIDENCE - 1, simultaneous=True),
            "p_adjusted": self.p_adjusted,
            "ci95_checkpoints": self.checkpoint_interval(),
            "se_images": self.se_images,
            "se_seeds": self.se_seeds,
            "df": self.df if math.isfinite(self.df) else None,
            "paired": self.paired,
            "seeds_needed": needed and [needed.low, needed.estimate, needed.high],
        }


def half_samples(
    image_ids: Sequence[int],
    resamples: int,
    seed: int,
    clusters: Optional[Sequence[Hashable]] = None,
) -> List[List[int]]:
    """Random halves of the images, the same for every run.

    Args:
        image_ids: Ids of all images of the data set.
        resamples: Number of halves.
        seed: Seed of the random choice.
        clusters: The cluster that each image belongs to, such as its video. Half of the clusters,
            rounded down, are then drawn as a whole. None: each image is a cluster.

    Returns:
        ``resamples`` sorted lists of ids.

    Raises:
        UserError: If there are more than MAX_RESAMPLES, or if there are fewer than 2 resamples,
            images or clusters, from which no spread can be measured.
    """
    if resamples < 2:
        raise UserError(f"--resamples {resamples}: at least 2 are needed to measure a spread")
    if resamples > MAX_RESAMPLES:
        raise UserError(f"--resamples {resamples}: use at most {MAX_RESAMPLES}")
    if seed < 0:
        raise UserError(f"--seed {seed}: must be 0 or more")
    ids = np.asarray(image_ids)
    if len(ids) < 2:
        raise UserError("the ground truth has 1 image; an interval needs at least 2")
    labels = ids.tolist() if clusters is None else list(clusters)
    members: Dict[Hashable, List[int]] = {}
    for label, key in sorted(zip(labels, ids.tolist()), key=lambda pair: pair[1]):
        members.setdefault(label, []).append(key)
    if len(members) < 2:
        raise UserError("all images are in one cluster; an interval needs at least 2")
    rng = np.random.default_rng(seed)
    groups = list(members.values())
    half = len(groups) // 2
    return [
        sorted(key for n in rng.permutation(len(groups))[:half] for key in groups[n])
        for _ in range(resamples)
    ]


def shared_spreads(
    ap: Mapping[str, np.ndarray],
    pairs: Sequence[Tuple[str, str]],
    paired: Optional[Sequence[bool]] = None,
) -> List[Optional[Spread]]:
    """The spread over seeds of each compared pair of norms, moderated over all pairs of a report.

    Args:
        ap: name -> float64 (k,), AP of each run of a norm under a condition.
        pairs: Names of a baseline and the norm compared with it.
        paired: For each pair, whether runs at the same position have the same seed and are paired;
            None: no runs are paired.

    Returns:
        One spread per pair; None where the two have unequal numbers of runs, one run, or no AP.
    """
    paired = [False] * len(pairs) if paired is None else paired
    found = [_pooled(ap[a], ap[b], together) for (a, b), together in zip(pairs, paired)]
    used = {name for pair, spread in zip(pairs, found) if spread for name in pair}
    total_df = sum(len(ap[name]) - 1 for name in used)
    shrunken = iter(moderated([s for s in found if s], total_df))
    return [s and next(shrunken) for s in found]


def _pooled(base: np.ndarray, other: np.ndarray, paired: bool = False) -> Optional[Spread]:
    """The spread of two norms with the same number of runs, (k,) float64; else None."""
    k = len(base)
    if k < 2 or k != len(other) or not np.isfinite([base, other]).all():
        return None
    if paired:
        return Spread(float((other - base).var(ddof=1)) / 2, k - 1)
    return Spread(float(base.var(ddof=1) + other.var(ddof=1)) / 2, 2 * (k - 1))


def moderated(spreads: Sequence[Spread], total_df: float) -> List[Spread]:
    """Spreads combined with their common distribution (Smyth 2004, limma's squeezeVar).

    No variance is lowered. If fewer than three are above 0, all are returned unchanged.

    Args:
        spreads: Spreads that are independent or nearly so, such as those of a report's comparisons.
        total_df: Degrees of freedom of all runs behind them, each run counted once.
    """
    # Not fitted are variances near 0, as of a norm that failed in the same way in all runs.
    typical = np.median([s.variance for s in spreads]) if spreads else 0.0
    fitted = [s for s in spreads if s.variance > _NEGLIGIBLE * typical]
    if len(fitted) < _MODERATED_FROM:
        return list(spreads)
    half_df = np.array([s.df for s in fitted]) / 2
    # The expectation and variance of log(chi^2(df) / df) are subtracted.
    logs = np.log([s.variance for s in fitted]) - special.digamma(half_df) + np.log(half_df)
    excess = logs.var(ddof=1) - special.polygamma(1, half_df).mean()
    prior_df = 2 * _inverse_trigamma(excess) if excess > 0 else math.inf
    center = logs.mean()
    if math.isfinite(prior_df):
        center += special.digamma(prior_df / 2) - math.log(prior_df / 2)
    prior = math.exp(center)
    found = []
    for s in spreads:
        weight = 1 / (1 + s.df / prior_df)  # 1 for an infinite prior_df
        variance = weight * prior + (1 - weight) * s.variance
        found.append(Spread(max(variance, s.variance), min(s.df + prior_df, total_df)))
    return found


def _inverse_trigamma(value: float) -> float:
    # trigamma falls from infinity to 0, between 1/x and 1/x + 1/x^2.
    high = 1 / value + 1
    low = 0.5 / value if value < 1 else 0.5 / math.sqrt(value)
    return float(optimize.brentq(lambda x: special.polygamma(1, x) - value, low, high))


def difference(
    base: np.ndarray,
    other: np.ndarray,
    base_replicates: np.ndarray,
    other_replicates: np.ndarray,
    units: int,
    spread: Optional[Spread] = None,
    comparisons: int = 1,
    paired: bool = False,
) -> Difference:
    """Compares one metric of two norms by the model above.

    Args:
        base, other: float64 (k,), AP of each run on all images, in percent.
        base_replicates, other_replicates: float64 (k, resamples), the same on each half sample.
        units: Number of images of the data set, or of clusters if these were drawn.
        spread: Spread of the runs of both norms, moderated over a report; None: it is calculated
            from these runs alone.
        comparisons: Number of comparisons that are reported together.
        paired: Whether runs at the same position have the same seed and are paired.
    """
    delta = float(other.mean() - base.mean())
    runs = len(base), len(other)
    if not np.isfinite(delta):
        return Difference(runs=runs, comparisons=comparisons)
    known = Difference(delta, units=units, runs=runs, comparisons=comparisons, paired=paired)
    # A half without any object of the metric's size has no AP and is left out.
    measured = np.isfinite(base_replicates).all(0) & np.isfinite(other_replicates).all(0)
    a, b = base_replicates[:, measured], other_replicates[:, measured]
    if a.shape[1] < 2:
        return known
    # Two norms that found nothing, on any images, are not the same for that.
    if delta == 0 and not np.ptp(a) and not np.ptp(b):
        return known
    if _same_runs(base, base_replicates, other, other_replicates):
        return replace(known, images=0.0, run_by_image=0.0, seeds=0.0, df=math.inf)
    half = units // 2
    scale = half / (units - half)
    images = scale * float((b.mean(0) - a.mean(0)).var(ddof=1))
    if 1 in runs:
        return replace(known, images=images, run_by_image=0.0)

    shares = [1 / k for k in runs]
    # A difference of paired runs has the variance of two runs.
    by_run = (
        [_run_by_image(b - a, scale) / 2] if paired else [_run_by_image(r, scale) for r in (a, b)]
    )
    shared = spread or _pooled(base, other, paired)
    if shared:
        run_by_image = float(np.mean(by_run)) * sum(shares)
        run_term, df = max(shared.variance * sum(shares), run_by_image), shared.df
    else:
        run_by_image = float(np.dot(by_run, shares))
        own = [max(x.var(ddof=1), t) * s for x, t, s in zip((base, other), by_run, shares)]
        run_term = float(sum(own))
        df = run_term**2 / sum(v**2 / (k - 1) for v, k in zip(own, runs)) if run_term else math.inf
    images = max(images - run_by_image, 0.0)
    well_known = _KNOWN * run_by_image if shared else 0.0
    return replace(
        known,
        images=images,
        run_by_image=run_by_image,
        seeds=max(run_term - run_by_image, 0.0),
        df=_df([(images + well_known, units - 1), (run_term - well_known, df)]),
        spread=Spread(run_term / sum(shares), df),
    )


def _same_runs(base, base_replicates, other, other_replicates) -> bool:
    """Whether both norms have the same results, in any order."""
    rows = [
        sorted(row.tobytes() for row in np.column_stack([ap, replicates]))
        for ap, replicates in ((base, base_replicates), (other, other_replicates))
    ]
    return rows[0] == rows[1]


def _run_by_image(replicates: np.ndarray, scale: float) -> float:
    """Var(T) of one run: replicates (k, resamples) about their mean over the k runs."""
    about_mean = replicates - replicates.mean(0)
    return scale * float(about_mean.var(axis=1, ddof=1).sum()) / (len(replicates) - 1)


def _df(terms: Sequence[Tuple[float, float]]) -> float:
    """Degrees of freedom of a sum of variances v_i: harmonic mean of the d_i, weighted by v_i."""
    total = sum(v for v, _ in terms)
    return total / sum(v / d for v, d in terms) if total > 0 else math.inf


def seeds_needed(
    spread: float, effect: float = EFFECT, image_se: float = 0.0, paired: bool = False
) -> Optional[int]:
    """Number of runs of each norm for which the 95 % interval finds ``effect`` with 80 % power.

    Args:
        spread: Standard deviation of AP over seeds, of one run.
        effect: True difference, in the same unit.
        image_se: Standard error of the difference from image sampling, which more runs do not
            reduce; 0 for a statement about these images only.
        paired: Whether runs are paired; ``spread`` is then that of a difference, divided by
            sqrt(2).

    Returns:
        At least 2; None if no number up to MAX_SEEDS suffices, for example because there are too
        few images.
    """

    def power(k: int) -> float:
        seeds = 2 * spread**2 / k
        total = image_se**2 + seeds
        df, shift = (k - 1) * (1 if paired else 2) * total / seeds, effect / math.sqrt(total)
        edge = stats.t.ppf((1 + CONFIDENCE) / 2, df)
        return stats.nct.sf(edge, df, shift) + stats.nct.cdf(-edge, df, shift)

    quantiles = stats.norm.ppf((1 + CONFIDENCE) / 2) + stats.norm.ppf(POWER)
    room = (effect / quantiles) ** 2 - image_se**2
    if room <= 0:
        return None
    if spread == 0:
        return 2
    # The normal approximation is a lower bound, and short by a few runs at most.
    k = max(2, int(min(2 * spread**2 / room, MAX_SEEDS + 1)))
    while k <= MAX_SEEDS and power(k) < POWER:
        k += 1
    return k if k <= MAX_SEEDS else None
