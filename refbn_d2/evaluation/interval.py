"""How sure a difference of AP is: image sampling and training seeds in one interval.

The model. The AP of norm X, trained with seed s and measured on the images D, is

    AP(X, s, D) = mu_X + I_X(D) + S_Xs + T_Xs(D)

with independent, zero-mean deviations: I_X is what drawing these images did to every run of X,
S_Xs what the seed did on any images, T_Xs(D) what it did on these. The runs of both norms see the
same images, so I is paired. The quantity of interest is mu_B - mu_A, estimated by the difference
delta of the means over seeds. With k_X runs of norm X its variance is

    V = Var(I_B - I_A) + sum over X in {A, B} of (Var(S_X) + Var(T_X)) / k_X

*Images.* Each resample draws half of the images without replacement and scores all runs on them.
For m of n images the variance of a statistic over such subsets, times m / (n - m), estimates its
variance over data sets (the delete-d jackknife; to first order the bootstrap's, and valid for
statistics less smooth than the bootstrap asks for). Images that belong together, such as the
frames of a video, are drawn together: m and n then count clusters. hotcoco's own ``compare`` draws
images with replacement but counts each once. Its subsets hold 63 % of the images and its standard
error is 1 / sqrt(e - 1) = 0.76 of the right one: that interval is too short, and is not used.

*Seeds.* The spread of AP over the runs of a norm, s_X^2, estimates Var(S_X) + Var(T_X). Where both
norms have the same number of runs k it is pooled: s^2 = (s_A^2 + s_B^2) / 2 with 2 (k - 1) degrees
of freedom, which stays right on average if the two spreads differ. With unequal numbers of runs
pooling would be biased, and each norm keeps its own s_X^2; their sum has the degrees of freedom of
Welch and Satterthwaite. With three or more pooled pairs in a report each s^2 is moderated by all of
them, as limma's squeezeVar does (Smyth 2004): the true variances are taken to scatter about a
common s_0^2 like s_0^2 d_0 / chi^2(d_0), with s_0^2 and d_0 fitted to the log s^2; then
(d_0 s_0^2 + d s^2) / (d_0 + d) has d_0 + d degrees of freedom, but at most those of all runs
together. Unlike limma's, an s^2 is raised by this and never lowered: a condition whose runs scatter
more than those of the others, such as a norm near divergence, keeps its own spread.

*Common seeds.* Runs of both norms with one seed share initial weights, the order of the data and
the drawn RoIs, and may do well or badly together; S and T are then not independent between norms.
From PAIRED_FROM runs on such runs are paired, as in the paired t-test: the spread is that of the
differences d_s between the two runs of a seed, s^2 = Var(d_s) / 2 with k - 1 degrees of freedom,
and T is that of the differences, too. This is valid whatever the correlation; it shortens the
interval if the correlation makes up for half of the degrees of freedom, which takes 0.31 with 5
runs and 0.58 with 3. Whether runs are paired depends on their number and not on their results,
because the shorter of two intervals would cover too little. docs/evaluation.md has measured
correlations.

*Together.* The resamples alone estimate Var(T), as the variance of a run about its norm's mean over
runs. Hence Var(T) is not counted twice, and the spread over seeds is never taken to be less than
Var(T), which is known well, only because runs happened to agree. The interval is
delta +- t(df) sqrt(V). With the images' part v_1 of V, the seeds' part v_2 and their degrees of
freedom d_1 (images, or clusters, less 1) and d_2, df is V / (v_1 / d_1 + v_2 / d_2), the harmonic
mean weighted by variance. Satterthwaite's V^2 / (v_1^2 / d_1 + v_2^2 / d_2) is larger, and covers
too little here: a v_2 that few runs made small by chance also loses its weight. Half of
Var(T), which the images tell well, is counted with v_1 where the spread is pooled: by simulation
all of it would cover too little, and none would make intervals longer than they need to be.

*One run.* A norm with a single run shows no spread over seeds. No interval on the norm is given
then, only one that treats the checkpoints as given (image sampling alone). To use another norm's
spread would assume that both spread alike, which one run cannot show.

Covered: another draw of images (or clusters) from where these came from, and another draw of
training seeds. Not covered: another data set, architecture, schedule or learning rate.

How these choices compare in coverage and length: dev/check_coverage.py, docs/evaluation.md.
"""

import enum
import math
from dataclasses import dataclass
from typing import Any, Dict, Hashable, List, Mapping, Optional, Sequence, Tuple

import numpy as np
from scipy import optimize, special, stats

from ..errors import UserError

__all__ = [
    "CONFIDENCE",
    "EFFECT",
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
MAX_SEEDS = 10_000
# Runs of each norm from which those with the same seed are paired. With fewer, the interval would
# be longer unless the correlation is high.
PAIRED_FROM = 5
# Comparisons from which on spreads are moderated: a distribution cannot be fitted to two.
_MODERATED_FROM = 3
# Part of Var(T) that keeps the degrees of freedom of the images; all of it would cover too little.
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
        variance: in squared percent AP, of one run.
        df: degrees of freedom with which it is known.
    """

    variance: float
    df: float


@dataclass(frozen=True)
class RunsNeeded:
    """Number of runs of each norm that detect an effect; None if no number up to MAX_SEEDS does.

    Attributes:
        estimate: if the spread over seeds is what it seems to be.
        low, high: if it is at the ends of its 95 % interval.
    """

    estimate: Optional[int]
    low: Optional[int]
    high: Optional[int]


@dataclass(frozen=True)
class Difference:
    """Other minus baseline for one metric, in percent AP; NaN where it cannot be had.

    Attributes:
        delta: difference of the means over seeds.
        images: variance of delta that image sampling adds and more runs do not reduce.
        run_by_image: variance of delta that more images or more runs reduce.
        seeds: variance of delta that training seeds add and more images do not reduce; NaN if a
            norm has one run.
        df: degrees of freedom of the sum of the three.
        units: images, or clusters of images, that were drawn.
        runs: of the baseline and of the other norm.
        spread: from run to run, of one run, or half the variance of the differences of paired runs;
            None if a norm has one run.
        paired: whether runs with the same seed were paired.
        comparisons: number of comparisons for which a simultaneous interval holds.
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
        """What training seeds add to se_images, in quadrature."""
        return math.sqrt(self.seeds)

    def interval(
        self, confidence: float = CONFIDENCE, simultaneous: bool = False
    ) -> Optional[Interval]:
        """The interval of the norms' difference; None if it cannot be had.

        Args:
            confidence: of the interval, or of all simultaneous intervals together.
            simultaneous: whether to correct for ``comparisons`` (Bonferroni).
        """
        return self._around(self.se, self.df, confidence, simultaneous)

    def checkpoint_interval(
        self, confidence: float = CONFIDENCE, simultaneous: bool = False
    ) -> Optional[Interval]:
        """As ``interval``, for these checkpoints on other images: says nothing about the norms."""
        return self._around(self.se_images, self.units - 1, confidence, simultaneous)

    def _around(self, se, df, confidence, simultaneous) -> Optional[Interval]:
        if math.isnan(self.delta) or math.isnan(se):
            return None
        if se == 0:
            return self.delta, self.delta
        tail = (1 - confidence) / 2 / (self.comparisons if simultaneous else 1)
        reach = float(-special.stdtrit(df, tail)) * se
        return self.delta - reach, self.delta + reach

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
        """p by Bonferroni: below 0.05 exactly where the simultaneous 95 % interval excludes 0."""
        return self.p if math.isnan(self.p) else min(1.0, self.p * self.comparisons)

    def verdict(self, margin: float = MARGIN, alpha: float = 1 - CONFIDENCE) -> Verdict:
        """What the simultaneous intervals say.

        Better or worse: 0 is outside of the 1 - ``alpha`` interval. Practically the same: the
        1 - 2 ``alpha`` interval lies within +-``margin`` (two one-sided tests).

        Args:
            margin: in percent AP.
            alpha: chance of any false verdict among the ``comparisons``.
        """
        ends = self.interval(1 - alpha, simultaneous=True)
        if ends is None:
            return Verdict.UNDECIDED
        if ends[0] > 0:
            return Verdict.BETTER
        if ends[1] < 0:
            return Verdict.WORSE
        low, high = self.interval(1 - 2 * alpha, simultaneous=True)
        return Verdict.SAME if -margin < low and high < margin else Verdict.UNDECIDED

    def runs_needed(self, effect: float = EFFECT) -> Optional[RunsNeeded]:
        """Number of runs of each norm that detect ``effect`` on as many images.

        None if the spread over seeds is unknown.
        """
        if self.spread is None:
            return None
        variance, df = self.spread.variance, self.spread.df
        image_se = math.sqrt(self.images)
        # The variance's own interval: df s^2 / sigma^2 is chi-square.
        tails = (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2
        ends = [variance * df / special.chdtri(df, tail) for tail in tails]
        estimate, low, high = (
            seeds_needed(math.sqrt(v), effect, image_se, self.paired) for v in (variance, *ends)
        )
        return RunsNeeded(estimate, low, high)

    def reach_with(self, more_runs: float = 1, more_images: float = 1) -> float:
        """Expected half-length of the simultaneous 95 % interval with more data.

        Args:
            more_runs, more_images: factors; 1 for the present number.
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
        image_ids: of the whole data set.
        resamples: number of halves.
        seed: of the draw.
        clusters: what each image belongs to, such as its video; half of the clusters, rounded
            down, are then drawn as a whole. None: each image is a cluster.

    Returns:
        ``resamples`` sorted lists of ids.

    Raises:
        UserError: with fewer than 2 resamples, images or clusters there is no spread to measure.
    """
    if resamples < 2:
        raise UserError(f"--resamples {resamples}: at least 2 are needed to measure a spread")
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
        pairs: names of a baseline and the norm compared with it.
        paired: for each pair, whether runs at the same position have the same seed and are paired;
            None: no runs are.

    Returns:
        a spread a pair; None where the two have unequal numbers of runs, one run, or no AP.
    """
    paired = [False] * len(pairs) if paired is None else paired
    found = [_pooled(ap[a], ap[b], together) for (a, b), together in zip(pairs, paired)]
    used = {name for pair, spread in zip(pairs, found) if spread for name in pair}
    total_df = sum(len(ap[name]) - 1 for name in used)
    shrunken = iter(moderated([s for s in found if s], total_df))
    return [s and next(shrunken) for s in found]


def _pooled(base: np.ndarray, other: np.ndarray, paired: bool = False) -> Optional[Spread]:
    """The spread of two norms with equally many runs, (k,) float64 each; None for other norms."""
    k = len(base)
    if k < 2 or k != len(other) or not np.isfinite([base, other]).all():
        return None
    if paired:
        return Spread(float((other - base).var(ddof=1)) / 2, k - 1)
    return Spread(float(base.var(ddof=1) + other.var(ddof=1)) / 2, 2 * (k - 1))


def moderated(spreads: Sequence[Spread], total_df: float) -> List[Spread]:
    """Spreads that learn from their common distribution (Smyth 2004, limma's squeezeVar).

    None is lowered. Fewer than three that are above 0 are returned as they are.

    Args:
        spreads: independent or nearly so, as of the comparisons in a report.
        total_df: degrees of freedom of all runs behind them, each run counted once.
    """
    # A norm that failed in the same way in all runs is not typical, and 0 has no logarithm.
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
        units: images of the data set, or clusters of images if these were drawn.
        spread: of the runs of both norms, moderated over a report; None: from these runs alone.
        comparisons: number of comparisons that are reported together.
        paired: whether runs at the same position have the same seed and are paired.
    """
    delta = float(other.mean() - base.mean())
    runs = len(base), len(other)
    if not np.isfinite(delta):
        return Difference(runs=runs, comparisons=comparisons)
    known = {
        "delta": delta, "units": units, "runs": runs, "comparisons": comparisons, "paired": paired
    }  # fmt: skip
    if _same_runs(base, base_replicates, other, other_replicates):
        return Difference(images=0.0, run_by_image=0.0, seeds=0.0, df=math.inf, **known)
    # A half without a single object of the metric's size says nothing about it.
    measured = np.isfinite(base_replicates).all(0) & np.isfinite(other_replicates).all(0)
    a, b = base_replicates[:, measured], other_replicates[:, measured]
    if a.shape[1] < 2:
        return Difference(**known)
    half = units // 2
    scale = half / (units - half)
    images = scale * float((b.mean(0) - a.mean(0)).var(ddof=1))
    if 1 in runs:
        return Difference(images=images, run_by_image=0.0, **known)

    shares = [1 / k for k in runs]
    # The variance of a difference of paired runs is that of two runs.
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
    return Difference(
        images=images,
        run_by_image=run_by_image,
        seeds=max(run_term - run_by_image, 0.0),
        df=_df([(images + well_known, units - 1), (run_term - well_known, df)]),
        spread=Spread(run_term / sum(shares), df),
        **known,
    )


def _same_runs(base, base_replicates, other, other_replicates) -> bool:
    """Whether both norms stand for the same results, in any order."""
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
    """Degrees of freedom of a sum of variances v_i: the mean of their d_i, harmonic, by weight."""
    total = sum(v for v, _ in terms)
    return total / sum(v / d for v, d in terms) if total > 0 else math.inf


def seeds_needed(
    spread: float, effect: float = EFFECT, image_se: float = 0.0, paired: bool = False
) -> Optional[int]:
    """Number of runs of each norm for which the interval at 95 % finds ``effect`` with 80 % power.

    Args:
        spread: standard deviation of AP over seeds, of one run.
        effect: true difference, in the same unit.
        image_se: standard error of the difference that image sampling alone leaves, however many
            the runs; 0 asks about these very images.
        paired: whether runs are paired; ``spread`` is then that of a difference, by sqrt(2).

    Returns:
        at least 2; None if no number up to MAX_SEEDS will do, for instance because images limit.
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
