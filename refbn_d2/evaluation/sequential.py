"""Decides when to stop adding training runs.

Testing after every run and stopping at the first p < 0.05 finds a difference in far more than 5 %
of comparisons without one. Here the numbers of runs per norm at which a test is made (the "looks")
are fixed before the first run, and the 5 % probability of a false verdict is distributed over the
looks. With at most K runs per norm, the looks up to k runs together have the error probability
0.05 (k / K)^2 (Lan and DeMets 1983), and each look has what it adds to this sum. All looks together
then err with a probability of at most 5 %, however their data depend on each other.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple

from ..errors import UserError
from .comparison import Comparison, compare
from .interval import CONFIDENCE, Verdict
from .runs import Run
from .text import MARKS, TITLES, bounds, signed

__all__ = ["Decision", "Plan", "Progress", "next_look", "review"]

_FIRST_LOOK = 3  # runs per norm; two runs say hardly anything about their spread


@dataclass(frozen=True)
class Plan:
    """The plan of an experiment, which is fixed before the first run.

    Attributes:
        max_seeds: Runs per norm at which the comparison ends, decided or not; at least 2.
        margin: Differences of AP within +-margin, in percent, do not matter in practice.
    """

    max_seeds: int = 12
    margin: float = 1.0

    def __post_init__(self) -> None:
        if self.max_seeds < 2:
            raise UserError(f"--max-seeds {self.max_seeds}: at least 2 runs per norm show a spread")
        if not 0 < self.margin < math.inf:
            raise UserError(f"--margin {self.margin}: must be a number above 0")

    @property
    def looks(self) -> Tuple[int, ...]:
        """Number of runs of each norm at each look: half of those at the next, and at least 3."""
        found = [self.max_seeds]
        while (found[0] + 1) // 2 >= _FIRST_LOOK and found[0] > _FIRST_LOOK:
            found.insert(0, (found[0] + 1) // 2)
        return tuple(found)

    def alpha(self, look: int) -> float:
        """Probability of a false verdict that the look at ``look`` runs may add."""

        def spent(runs: int) -> float:
            return (1 - CONFIDENCE) * (runs / self.max_seeds) ** 2

        earlier = [k for k in self.looks if k < look]
        return spent(look) - (spent(earlier[-1]) if earlier else 0.0)


@dataclass(frozen=True)
class Decision:
    """A verdict, which is final, and the number of runs per norm after which it was reached."""

    verdict: Verdict
    runs: int


@dataclass(frozen=True)
class Progress:
    """What is known so far, and what to do next.

    Attributes:
        decided: label of a comparison -> its decision.
        open: labels of the other comparisons.
        wanted: Number of runs that each norm of an open comparison, and its baseline, should have
            at the next look; 0 if there is none, because all is decided or the last look is over.
        runs_left: Number of finished runs that are missing for the next look.
        lines: One sentence per comparison.
    """

    decided: Dict[str, Decision]
    open: List[str]
    wanted: int
    runs_left: int
    lines: List[str]

    @property
    def finished(self) -> bool:
        return self.wanted == 0


def next_look(
    runs: Sequence[Run],
    gt_path: Path,
    plan: Plan,
    iou_types: Sequence[str] = ("bbox",),
    baseline: Optional[str] = None,
    resamples: int = 1000,
    seed: int = 0,
    advance: Callable[[str], None] = lambda what: None,
    *,
    primary: Optional[str] = None,
    cluster: Optional[str] = None,
) -> Progress:
    """What the runs so far decide, and how many more are necessary.

    The function stores nothing: the same runs give the same answer, so an interrupted experiment
    continues with another call. Earlier looks are computed again from the runs of that time, which
    are the ones with the lowest seeds.

    Args:
        runs: Runs of every norm and condition to compare, finished or not, even before they ran.
        gt_path, iou_types, baseline, resamples, seed, advance, primary, cluster: As in
            ``comparison.compare``.
        plan: The plan, the same in every call.

    Raises:
        UserError: As in ``comparison.compare``.
    """
    planned = {(run.name, run.condition) for run in runs}
    finished = [run for run in runs if not run.error]
    counts = [sum((run.name, run.condition) == key for run in finished) for key in sorted(planned)]
    first = plan.looks[0]
    if not counts or min(counts) < first:
        missing = sum(max(first - count, 0) for count in counts)
        text = f"Nothing can be said before {first} runs per norm."
        return Progress({}, [], first, missing, [text])
    comparison = compare(
        runs, gt_path, iou_types, baseline, resamples, seed, advance,
        primary=primary, margin=plan.margin, cluster=cluster,
    )  # fmt: skip
    return review(comparison, plan)


def review(comparison: Comparison, plan: Plan) -> Progress:
    """As ``next_look``, for runs that are already scored."""
    decided: Dict[str, Decision] = {}
    undecided = list(comparison.differences)
    lines: Dict[str, str] = {}
    for look in plan.looks:
        missing = _missing(comparison, undecided, look)
        if missing:
            ordered = [lines[label] for label in comparison.differences if label in lines]
            return Progress(decided, undecided, look, missing, ordered)
        then = comparison.with_first_runs(look)
        for label in undecided:
            verdict = then.primary_difference(label).verdict(plan.margin, plan.alpha(look))
            lines[label] = _line(then, label, verdict, plan, look)
            if verdict is not Verdict.UNDECIDED:
                decided[label] = Decision(verdict, look)
        undecided = [label for label in undecided if label not in decided]
        if not undecided:
            break
    return Progress(decided, undecided, 0, 0, [lines[label] for label in comparison.differences])


def _missing(comparison: Comparison, labels: Sequence[str], look: int) -> int:
    """Number of runs missing for the look at ``look`` runs in the comparisons ``labels``."""
    groups = {name for k in labels for name in (k, comparison.base_of(k).label)}
    return sum(max(look - len(comparison.groups[name].runs), 0) for name in groups)


def _line(comparison: Comparison, label: str, verdict: Verdict, plan: Plan, look: int) -> str:
    d, alpha = comparison.primary_difference(label), plan.alpha(look)
    same = verdict is Verdict.SAME
    ends = d.interval(1 - (2 * alpha if same else alpha), simultaneous=True)
    within = f", within ±{plan.margin:g}" if same else ""
    text = (
        f"{MARKS[verdict]} {label} against {comparison.baseline}, {TITLES[comparison.primary]} AP: "
        f"{verdict.value} after {look} runs per norm, {signed(d.delta)} {bounds(ends)}{within}."
    )
    later = [k for k in plan.looks if k > look]
    if verdict is Verdict.UNDECIDED and later:
        now, then = (d.reach_with(more_runs=k / look) for k in (look, later[0]))
        text += f" With {later[0]} runs expect a 95 % interval of ±{then:.2f}, now ±{now:.2f}."
    return text
