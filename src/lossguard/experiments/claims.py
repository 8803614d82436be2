"""The paper's claims, judged by records: reproduced, not reproduced or not run.

The fallback is SGDnm, the very optimizer that the guards of a figure fall back to, run alone.
``docs/paper.md`` has the verdicts.

Letters: k an optimizer step, K the step at which an end is judged.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from ..records import Record
from . import judges
from .evidence import Evidence, gather
from .formulas import Finding, each, either, found, from_first, ratio_of, rises
from .judges import GL2O, PARTS, K, marks, on, on_each

Outcome = Literal["reproduced", "not reproduced", "not run"]
OUTCOMES: Mapping[bool | None, Outcome] = {
    True: "reproduced",
    False: "not reproduced",
    None: "not run",
}


class Verdict(NamedTuple):
    """What the records say of a claim."""

    id: str
    figure: str
    """Of the paper, or where else it says so."""
    says: str
    numbers: str
    seeds: str
    """How many speak, and from which mark on if it changes."""
    mark: int
    """The last one reached, 0 if there is none."""
    verdict: Outcome


class Claim(NamedTuple):
    """What the paper says, and what judges it."""

    id: str
    figure: str
    says: str
    judge: Callable[[Evidence], Finding]


def judge_claims(records: Mapping[Path, Record]) -> list[Verdict]:
    """Every claim once, in the paper's order, judged by the records of these folders.

    Those of other experiments are passed over.
    """
    evidence = gather(records)
    return [_verdict(claim, found(lambda judge=claim.judge: judge(evidence))) for claim in CLAIMS]


def _verdict(claim: Claim, finding: Finding) -> Verdict:
    told, before = [], 0
    for k, count in sorted(finding.seeds.items()):
        if count != before:
            told.append(f"{count} from {k:,}" if told else f"{count}")
        before = count
    mark = max(finding.seeds, default=0)
    return Verdict(*claim[:3], finding.numbers, ", ".join(told), mark, OUTCOMES[finding.holds])


_behind = either(GL2O, lambda m: ratio_of(m, ["L2O"], marks(100, 300), ">", 1))
_tracks = ratio_of("LGL2O", ["SGDnm"], marks(100, K), "<=", 1.05, beyond=True)
_over_adam = ratio_of(
    "LGL2O over Adam 0.01",  # its rate in the paper
    ["LGL2O over SGDnm 3"],
    [120_000],
    "<",
    1,
    what="with Adam 0.01 as the fallback over with SGDnm",
)
_stuck = each(*(ratio_of(m, ["LGL2O"], [50_000], ">", 3) for m in ("SGDnm", "GL2O")))
_steady = rises("LGL2O", K, expected=False)
_ahead = ratio_of("LGL2O", ["L2O"], marks(10_000, K), "<", 1, beyond=True)
_best = ratio_of("LGL2O", ["L2O", "GL2O", "SGDnm"], [K], "<", 1)
_all_times = ratio_of("LGL2O", PARTS, marks(30, K), "<=", 1.1, beyond=True)

TABLE: Sequence[tuple[str, str, Callable[[Evidence], Finding]]] = [
    ("2a", "meta-training converges", judges.converges),
    (
        "2b",
        "L2O carries over to Fashion-MNIST, Moons, Circles, not to Spirals and CIFAR-10",
        on(2, judges.carries_over),
    ),
    ("3a", "L2O is the fastest at first", on(3, judges.fastest)),
    (
        "3b",
        "then L2O stops improving or diverges",
        on(3, ratio_of("L2O", ["SGDnm"], [K], ">", 1, beyond=True)),
    ),
    ("3c", "LGL2O is as good as or better than either part at all times", on(3, _all_times)),
    (
        "3d",
        "to step 100 GL2O is better than SGDnm and much worse than L2O",
        on(3, either(GL2O, judges.early_price)),
    ),
    ("3e", "LGL2O goes over to the fallback", on(3, judges.goes_over)),
    (
        "4a",
        "LGL2O is comparable to L2O early",
        on(4, ratio_of("LGL2O", ["L2O"], marks(100, 1_000), "<=", 1.5)),
    ),
    ("4b", "L2O diverges later", on(4, rises("L2O", K, expected=True))),
    ("4c", "GL2O is behind L2O early", on(4, _behind)),
    ("4d", "LGL2O itself rises late, for the noise of ten check minibatches", on(4, judges.noise)),
    (
        "5a",
        "SGDnm stays on a plateau forever",
        on(5, ratio_of("SGDnm", ["LGL2O"], [50_000], ">", 3)),
    ),
    ("5b", "Adam stays there very long", on(5, from_first("Adam 0.01", 1_000, 0.5))),
    (
        "5c",
        "LGL2O is as fast as L2O",
        on(5, ratio_of("LGL2O", ["L2O"], marks(30, 30_000), "<=", 1.5)),
    ),
    (
        "5d",
        "after 50,000 steps LGL2O is better than both its parts",
        on(5, ratio_of("LGL2O", PARTS, [K], "<", 0.9, beyond=True)),
    ),
    ("5e", "the loss of L2O rises considerably at first", on(5, judges.rises_at_first)),
    *(
        row
        for n in (6, 7, 8)
        for row in (
            (f"{n}a", "L2O diverges very quickly", on(n, judges.diverges("L2O"))),
            (f"{n}b", "GL2O diverges too", on(n, either(GL2O, judges.diverges))),
            (f"{n}c", "LGL2O tracks its fallback", on(n, _tracks)),
        )
    ),
    ("9", "Adam is the better fallback on Spirals", on(9, _over_adam)),
    ("10", "a grid over rate and decay chose 0.01 and 50,000", on(10, judges.grid)),
    (
        "11a",
        "meta-training on CIFAR-10 + ConvNet goes from exploding to stable losses",
        judges.explodes,
    ),
    (
        "11b",
        "its L2O carries over to other data and to the test set",
        on_each([13, 16], judges.after_its_horizon),
    ),
    ("12a", "L2O is stable, LGL2O is better in the end", on(12, judges.better_in_the_end)),
    ("12b", "LGL2O rises late, for the noise of the check", on(12, judges.noise)),
    (
        "13a",
        "until it rises LGL2O is better than both its parts",
        on(13, ratio_of("LGL2O", PARTS, marks(1_000, 30_000), "<", 1)),
    ),
    ("13b", "LGL2O rises late, for the noise of the check", on(13, judges.noise)),
    ("14a", "SGDnm and GL2O get stuck, L2O and LGL2O do not", on(14, _stuck)),
    ("14b", "LGL2O is better than L2O and keeps converging", on(14, each(_ahead, _steady))),
    (
        "15",
        "L2O and LGL2O are faster than GL2O, all are faster than SGDnm",
        on(15, either(GL2O, judges.faster)),
    ),
    (
        "16",
        "LGL2O is better than L2O, GL2O and SGDnm, and keeps it",
        on(16, each(_best, _steady)),
    ),
    ("S3", "2 gradients a step and 2 nc / nt forward passes; GL2O 2 gradients", judges.counted),
    ("A", "LGL2O is stable for millions of steps", judges.million),
]
"""Name, what the paper says, what judges it."""
ELSEWHERE = {"5e": "section 4", "S3": "section 3", "A": "abstract"}
"""Where the paper says it, if it isn't the caption of the figure that the name begins with."""
CLAIMS = [
    Claim(id, ELSEWHERE.get(id, id.rstrip("abcde")), says, judge) for id, says, judge in TABLE
]
