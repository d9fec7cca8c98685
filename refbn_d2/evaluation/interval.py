"""How sure a difference of AP is: image sampling and training seeds in one interval.

The model. The AP of norm X, trained with seed s and measured on the images D, is

    AP(X, s, D) = mu_X + I_X(D) + S_Xs + T_Xs(D)

with independent, zero-mean deviations: I_X is what drawing these images did to every run of X,
S_Xs what the seed did on any images, T_Xs(D) what it did on these. The runs of both norms see the
same images, so I is paired. The quantity of interest is mu_B - mu_A, estimated by the difference
of the means over seeds. With k seeds a norm its variance is

    V = Var(I_B - I_A) + sum over X in {A, B} of (Var(S_X) + Var(T_X)) / k_X

* *Images.* Each resample draws half of the images without replacement and scores all runs on them.
  For m of n images the variance of a statistic over such subsets, times m / (n - m), estimates its
  variance over data sets (the delete-d jackknife; to first order the bootstrap's, and valid for
  statistics less smooth than the bootstrap asks for). hotcoco's own ``compare`` draws images with
  replacement but counts each once. Its subsets hold 63 % of the images and its standard error is
  1 / sqrt(e - 1) = 0.76 of the right one: that interval is too short, and is not used.
* *Seeds.* The spread of AP over seeds estimates Var(S) + Var(T). The resamples alone estimate
  Var(T), as the variance of a run about its norm's mean over runs. Hence Var(T) is not counted
  twice, and the seed spread is never taken to be less than Var(T), which is known well, only
  because two runs happened to agree.
* *Interval.* delta +- t * sqrt(V), with the Welch-Satterthwaite degrees of freedom of the terms:
  k_X - 1 of a norm's seeds, n - 1 of the images. The p-value is of the same t.
* A norm with one run borrows the seed variance of the other. If both have one run the seeds cannot
  be judged: the interval covers image sampling only.

Covered: another draw of images from where these came from, and another draw of training seeds.
Not covered: another data set, architecture, schedule or learning rate, and images that are
dependent (frames of one video). Seeds are treated as independent between norms, although equal
seed numbers may share initialization and data order; if that makes them alike, the interval is
longer than it needs to be.
"""

from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple

import numpy as np
from scipy import stats

from ..errors import UserError

__all__ = ["Difference", "difference", "half_samples", "holm", "seeds_needed"]

CONFIDENCE = 0.95
POWER = 0.8
EFFECT = 0.5  # AP, the paper's claim
MAX_SEEDS = 10_000


@dataclass(frozen=True)
class Difference:
    """Other minus baseline for one metric, in percent AP; None where it cannot be had.

    Attributes:
        delta: difference of the means over seeds.
        ci95: lower and upper end.
        p: two-sided, of "no difference", not corrected for other comparisons.
        se_images: standard error due to image sampling, of the difference of these runs.
        se_seeds: what training seeds add to it in quadrature; None if both norms have one run.
        seeds_needed: runs a norm that would show a true difference of EFFECT on these images.
    """

    delta: Optional[float] = None
    ci95: Optional[Tuple[float, float]] = None
    p: Optional[float] = None
    se_images: Optional[float] = None
    se_seeds: Optional[float] = None
    seeds_needed: Optional[int] = None


def half_samples(image_ids: Sequence[int], resamples: int, seed: int) -> List[List[int]]:
    """Random halves of the images, the same for every run.

    Returns:
        ``resamples`` sorted lists of ``len(image_ids) // 2`` ids.

    Raises:
        UserError: with fewer than 2 resamples or 2 images there is no spread to measure.
    """
    if resamples < 2:
        raise UserError(f"--resamples {resamples}: at least 2 are needed to measure a spread")
    if seed < 0:
        raise UserError(f"--seed {seed}: must be 0 or more")
    if len(image_ids) < 2:
        raise UserError("the ground truth has 1 image; an interval needs at least 2")
    rng = np.random.default_rng(seed)
    ids = np.sort(np.asarray(image_ids))
    half = len(ids) // 2
    return [np.sort(rng.permutation(ids)[:half]).tolist() for _ in range(resamples)]


def difference(
    base: np.ndarray,
    other: np.ndarray,
    base_replicates: np.ndarray,
    other_replicates: np.ndarray,
    num_images: int,
) -> Difference:
    """Compares one metric of two norms by the model above.

    Args:
        base, other: float64 (k,), AP of each run on all images, in percent.
        base_replicates, other_replicates: float64 (k, resamples), the same on each half sample.
        num_images: of the data set.
    """
    delta = float(other.mean() - base.mean())
    if not np.isfinite(delta):
        return Difference()
    # A half without a single object of the metric's size says nothing about it.
    measured = np.isfinite(base_replicates).all(0) & np.isfinite(other_replicates).all(0)
    a, b = base_replicates[:, measured], other_replicates[:, measured]
    if a.shape[1] < 2:
        return Difference(delta)
    half = num_images // 2
    scale = half / (num_images - half)
    images = scale * float((b.mean(0) - a.mean(0)).var(ddof=1))

    groups = [(x, r) for x, r in ((base, a), (other, b)) if len(x) > 1]
    if not groups:
        return _result(delta, images, [(images, num_images - 1)], None, None)
    spread = [(x.var(ddof=1), _run_by_image(r, scale), len(x)) for x, r in groups]
    # One term a norm; a norm with a single run borrows, and shares the other's uncertainty.
    shares = [1 / k for _, _, k in spread] if len(groups) == 2 else [1 / len(base) + 1 / len(other)]
    seed_terms = [
        (max(seed, inter) * share, k - 1) for (seed, inter, k), share in zip(spread, shares)
    ]
    inter = sum(inter * share for (_, inter, _), share in zip(spread, shares))
    terms = [(max(images - inter, 0.0), num_images - 1), *seed_terms]
    needed = seeds_needed(float(np.sqrt(np.mean([seed for seed, _, _ in spread]))))
    extra = sum(v for v, _ in terms) - images
    return _result(delta, images, terms, max(extra, 0.0), needed)


def _run_by_image(replicates: np.ndarray, scale: float) -> float:
    """Var(T) of one run: replicates (k, resamples) about their mean over the k runs."""
    about_mean = replicates - replicates.mean(0)
    return scale * float(about_mean.var(axis=1, ddof=1).sum()) / (len(replicates) - 1)


def _result(delta, images, terms, seeds, needed) -> Difference:
    variance = sum(v for v, _ in terms)
    se_seeds = None if seeds is None else float(np.sqrt(seeds))
    if variance == 0:
        p = 1.0 if delta == 0 else 0.0
        return Difference(delta, (delta, delta), p, 0.0, se_seeds, needed)
    df = variance**2 / sum(v**2 / d for v, d in terms)
    reach = stats.t.ppf((1 + CONFIDENCE) / 2, df) * np.sqrt(variance)
    p = float(2 * stats.t.sf(abs(delta) / np.sqrt(variance), df))
    ends = (float(delta - reach), float(delta + reach))
    return Difference(delta, ends, p, float(np.sqrt(images)), se_seeds, needed)


def seeds_needed(spread: float, effect: float = EFFECT) -> Optional[int]:
    """Runs a norm for which a two-sample t-test at 5 % finds ``effect`` with 80 % power.

    Args:
        spread: standard deviation of AP over seeds, on one set of images.
        effect: true difference, in the same unit.

    Returns:
        at least 2; None beyond MAX_SEEDS.
    """

    def power(k: int) -> float:
        df, shift = 2 * k - 2, effect / spread * np.sqrt(k / 2)
        edge = stats.t.ppf((1 + CONFIDENCE) / 2, df)
        return stats.nct.sf(edge, df, shift) + stats.nct.cdf(-edge, df, shift)

    if spread == 0:
        return 2
    # The normal approximation is a lower bound, and short by a few runs at most.
    quantiles = stats.norm.ppf((1 + CONFIDENCE) / 2) + stats.norm.ppf(POWER)
    k = max(2, int(2 * (quantiles * spread / effect) ** 2))
    while k <= MAX_SEEDS and power(k) < POWER:
        k += 1
    return k if k <= MAX_SEEDS else None


def holm(p: Sequence[Optional[float]]) -> List[Optional[float]]:
    """Holm's step-down correction of p-values of one family; None stays None."""
    known = sorted((value, n) for n, value in enumerate(p) if value is not None)
    corrected: List[Optional[float]] = [None] * len(p)
    largest = 0.0
    for rank, (value, n) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * value))
        corrected[n] = largest
    return corrected
