"""The words and numbers that report.md and report.html share."""

import math
from typing import Dict, List, Optional, Tuple

from .comparison import Comparison
from .interval import CONFIDENCE, EFFECT, LARGEST, PAIRED_FROM, Difference, RunsNeeded, Verdict

__all__ = [
    "MARKS", "SEEDS_LEAD", "TITLES", "bounds", "interval", "model_text", "number", "p_value",
    "seed_lines", "signed", "verdict_text", "verdicts",
]  # fmt: skip

TITLES = {"bbox": "box", "segm": "mask"}
MARKS = {Verdict.BETTER: "▲", Verdict.WORSE: "▼", Verdict.SAME: "≈", Verdict.UNDECIDED: "?"}
# Fields of COCO images that may name the cluster of an image.
CLUSTER_FIELDS = ("video", "camera", "site", "group")


def number(value: Optional[float]) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.1f}"


def signed(value: Optional[float], digits: int = 2) -> str:
    # A difference that is rounded to zero is shown without a sign.
    if value is None or math.isnan(value):
        return "–"
    rounded = round(value, digits)
    return f"{rounded:+.{digits}f}".replace("-", "−") if rounded else f"{0:.{digits}f}"


def interval(d: Difference) -> str:
    """The simultaneous 95 % interval, from which the verdict follows."""
    return bounds(d.interval(simultaneous=True))


def bounds(ends: Optional[Tuple[float, float]]) -> str:
    return "" if ends is None else f"[{signed(ends[0])}, {signed(ends[1])}]"


def p_value(p: Optional[float]) -> str:
    if p is None or math.isnan(p):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def verdicts(comparison: Comparison) -> List[Dict[str, str]]:
    """One sentence per comparison on the primary AP: {"label", "verdict", "mark", "text"}."""
    return [
        {
            "label": label,
            "verdict": comparison.verdict(label).value,
            "mark": MARKS[comparison.verdict(label)],
            "text": verdict_text(comparison, label),
        }
        for label in comparison.differences
    ]


def verdict_text(comparison: Comparison, label: str) -> str:
    """The result for ``label`` and its baseline, in one or two sentences."""
    d, verdict = comparison.primary_difference(label), comparison.verdict(label)
    base, ap = comparison.baseline, f"{TITLES[comparison.primary]} AP"
    found = f"{signed(d.delta)} {interval(d)}".strip()
    if math.isnan(d.delta):
        return f"{label} and {base} have no {ap} to compare."
    if 1 in d.runs and d.se != 0:
        return _one_run_text(d, label, base, ap)
    if verdict is Verdict.SAME:
        if d.se == 0:
            return f"{label} and {base} are the same results: their difference in {ap} is 0."
        inner = bounds(d.interval(2 * CONFIDENCE - 1, simultaneous=True))
        return (
            f"{label} and {base} are practically the same in {ap}: {signed(d.delta)}, and its 90 % "
            f"interval {inner} lies within ±{comparison.margin:g}."
        )
    ends = d.interval(simultaneous=True)
    if verdict is Verdict.UNDECIDED:
        excluded = ""
        if ends == (-LARGEST, LARGEST):
            excluded = " These runs exclude no difference; train more of them."
        elif ends:
            excluded = (
                f" Effects beyond {signed(ends[0], 1)} and {signed(ends[1], 1)} AP are excluded."
            )
        return f"Undecided whether {label} differs from {base} in {ap}: {found}.{excluded}"
    text = f"{label} is {verdict.value} than {base} in {ap}: {found}."
    if ends and max(map(abs, ends)) < comparison.margin:
        text += f" The difference is smaller than the margin of {comparison.margin:g} AP."
    return text


def _one_run_text(d: Difference, label: str, base: str, ap: str) -> str:
    ends = d.checkpoint_interval(simultaneous=True)
    differ = ends is not None and not ends[0] <= 0 <= ends[1]
    what = "two checkpoints" if d.runs == (1, 1) else "checkpoints"
    who = "each has" if d.runs == (1, 1) else f"{base if d.runs[0] == 1 else label} has"
    return (
        f"Undecided whether {label} differs from {base}, because {who} one run. These {what} "
        f"{'differ' if differ else 'do not differ measurably'} in {ap}: {signed(d.delta)} "
        f"{bounds(ends)}. This interval covers image sampling only; how much AP varies between "
        "training seeds is unknown. Train at least 3 runs per norm."
    )


SEEDS_LEAD = (
    "Sources of the variance of each difference, what would shorten its interval, and how many "
    f"runs per norm are needed to detect a true difference of {EFFECT} AP (80 % power, 5 % level; "
    "in brackets the range that is compatible with these runs):"
)


def seed_lines(comparison: Comparison) -> List[str]:
    """The parts of the variance: one line per comparison, on the primary AP."""
    return [
        f"{label} ({d.runs[1]} against {d.runs[0]} runs): {_budget(d, comparison)}"
        for label, d in ((k, comparison.primary_difference(k)) for k in comparison.differences)
    ]


def _budget(d: Difference, comparison: Comparison) -> str:
    needed = d.runs_needed()
    if needed is None:
        if d.se == 0:
            return "the same results."
        return "unknown" + (
            ", because one run shows no variance over seeds." if 1 in d.runs else "."
        )
    units = "clusters" if comparison.cluster else "images"
    total = d.se**2
    shares = {
        "seeds": d.seeds,
        units: d.images,
        "interaction of seeds and images": d.run_by_image,
    }
    budget = ", ".join(f"{v / total:.0%} {name}" for name, v in shares.items())
    now, runs, images = d.reach_with(), d.reach_with(more_runs=2), d.reach_with(more_images=2)
    advice = "more runs" if runs < images else f"more {units}"
    return (
        f"{budget}. Twice the runs would shorten ±{now:.2f} to about ±{runs:.2f}, twice the "
        f"{units} to ±{images:.2f}: {advice} help more. For {EFFECT} AP: {_needed(needed, units)}."
    )


def _needed(needed: RunsNeeded, units: str) -> str:
    if needed.low is None:
        return f"no number of runs suffices with this many {units}"
    if needed.estimate is None:
        return f"at least {needed.low:,} runs; perhaps no number suffices with this many {units}"
    high = "any number" if needed.high is None else f"{needed.high:,}"
    return f"{needed.estimate:,} runs ({needed.low:,} to {high})"


def _possible_clusters(comparison: Comparison) -> str:
    images = comparison.gt.dataset["images"]
    found = [k for k in CLUSTER_FIELDS if images and all(k in image for image in images)]
    if not found:
        return ""
    return f" (if images of one {found[0]} are alike, use --cluster {found[0]})"


def model_text(comparison: Comparison) -> str:
    """The statistical model in one paragraph."""
    count = len(comparison.differences)
    drawn = f"{len(comparison.gt.sizes)} images"
    independent = "and dependence between images" + _possible_clusters(comparison)
    if comparison.cluster:
        drawn = f"{comparison.units} clusters ({comparison.cluster}) of the {drawn}"
        independent = "and dependence between clusters"
    simultaneous = (
        f" They are corrected for the {count} comparisons of a metric (Bonferroni)."
        if count > 1
        else ""
    )
    single = any(1 in comparison.primary_difference(k).runs for k in comparison.differences)
    one_run = (
        " If a norm has one run, the choice of the training seed is NOT covered, and there is no "
        "interval for the norm."
        if single
        else ""
    )
    paired = [comparison.primary_difference(k).paired for k in comparison.differences]
    pairs = " The runs with the same seed are paired" if any(paired) else ""
    if pairs:
        which = (
            "" if all(paired) else f" where both norms have the same {PAIRED_FROM} or more seeds"
        )
        pairs += f"{which}: the variance is then that of their differences."
    return (
        "Each interval is a 95 % t-interval for the mean over seeds of a norm minus that of "
        f"{comparison.baseline}.{simultaneous} Its variance has two parts. Image sampling: all "
        f"runs are scored on the same {comparison.resamples} random halves of the {drawn} (paired "
        "delete-half jackknife). Training seeds: the variance of AP over the runs, minus the part "
        "that image sampling explains. It is pooled over both norms if they have equally many "
        "runs, and moderated by the other comparisons if there are three or more."
        f"{pairs}{one_run} "
        f"The verdict is on {TITLES[comparison.primary]} AP alone: better or worse if its interval "
        f"excludes 0; practically the same (≈) if its 90 % interval lies within "
        f"±{comparison.margin:g} AP; otherwise undecided. "
        "Not covered: other data sets, architectures, schedules and learning rates, "
        f"{independent}."
    )
