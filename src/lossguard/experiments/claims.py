"""The paper's claims, judged by records: reproduced, not reproduced or not run.

A row of ``CLAIMS`` is a statement of the paper and the formulas that judge it. The fallback is
SGDnm, the very optimizer that the guards of a figure fall back to, run alone. ``docs/paper.md`` has
the verdicts.

Letters: m a method, k an optimizer step, K the step at which an end is judged.
"""

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import polars as pl

from ..runs.records import Record
from .evidence import MARKS, Evidence, Measured, NotRunError, gather
from .recipes import PAPERS

K = 100_000
"""Where the paper gives no length."""
BEYOND = [k for k in MARKS if k > K]
"""What is told beside a verdict, and isn't judged."""
META_STEPS = 10_000
HORIZON = 600
"""Steps of a rollout of meta-training on CIFAR-10 + ConvNet."""
GL2O = ("GL2O", "GL2O (theta as decay)", "GL2O (every step)")
"""Readings of the rival: a claim about it is reproduced if it is so by one that was run."""
PARTS = ("L2O", "SGDnm")
NC_100 = "LGL2O (nc 100)"
CHOSEN = "SGDnm 0.01 tau 50000"
"""By the paper's grid."""
HOLDS: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    "=": lambda a, b: math.isclose(a, b, abs_tol=1e-3),
}

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


class Finding(NamedTuple):
    """Whether a formula holds, and the numbers that say so."""

    holds: bool | None
    """None if it was not run."""
    numbers: str
    seeds: Mapping[int, int] = {}
    """How many at each mark."""


Formula = Callable[[Evidence], Finding]


class Claim(NamedTuple):
    """What the paper says, and what judges it: all of several formulas, on each of some figures."""

    id: str
    says: str
    figures: Sequence[str]
    """Or meta-trainings, as ``gather`` names them."""
    formulas: Sequence[Formula]
    where: str = ""
    """The paper says it, if it isn't the caption of the figure that the name begins with."""


def judge_claims(records: Mapping[Path, Record]) -> list[Verdict]:
    """Every claim once, in the paper's order, judged by the records of these folders.

    Those of other experiments are passed over.
    """
    evidence = gather(records)
    return [judge(claim, evidence) for claim in CLAIMS]


def judge(claim: Claim, evidence: Mapping[str, Evidence]) -> Verdict:
    """A claim, by what is known of figures."""
    findings = []
    for name in claim.figures:
        if name in evidence:
            found = together(formula(evidence[name]) for formula in claim.formulas)
        else:
            found = Finding(None, f"no run of {name}")
        where = f"{name}: " if name in evidence and len(claim.figures) > 1 else ""
        findings.append(found._replace(numbers=where + found.numbers))
    holds, numbers, counts = together(findings)
    seeds, before = [], 0
    for k, count in sorted(counts.items()):
        if count != before:
            seeds.append(f"{count} from {k:,}" if seeds else f"{count}")
        before = count
    figure, mark = claim.where or claim.id.rstrip("abcde"), max(counts, default=0)
    return Verdict(claim.id, figure, claim.says, numbers, ", ".join(seeds), mark, OUTCOMES[holds])


def together(findings: Iterable[Finding]) -> Finding:
    """Several as one: one that fails decides, then one not run. Fewest seeds at a mark count."""
    several, seeds = list(findings), {}
    for k, count in (item for one in several for item in one.seeds.items()):
        seeds[k] = min(count, seeds.get(k, count))
    holds = min((one.holds for one in several), key=(False, None, True).index)
    return Finding(holds, "; ".join(dict.fromkeys(one.numbers for one in several)), seeds)


def at_marks(
    what: str,
    value: pl.Expr,
    marks: Sequence[int],
    holds: str = "<",
    bound: float = math.nan,
    told: Sequence[int] = (),
) -> Formula:
    """Whether a value, as ``Evidence.measure`` takes it, keeps a bound at every mark.

    One that fails decides. ``holds`` is one of ``HOLDS``. At marks ``told`` nothing is judged.
    """

    def formula(evidence: Evidence) -> Finding:
        reached, missing = {}, ""
        for k in (*marks, *told):
            try:
                reached[k] = evidence.measure(value, k)
            except NotRunError as error:
                missing = missing or str(error)
        tested = {k: one for k, one in reached.items() if k in marks}
        others = {k: one for k, one in reached.items() if k not in marks}
        if not (tested if marks else others):
            return Finding(None if marks else True, missing)
        failed = [k for k, one in tested.items() if not HOLDS[holds](one.value, bound)]
        outcome = False if failed else True if len(tested) == len(marks) else None
        numbers = _told(tested or others, failed, bound)
        numbers += f"; not judged: {_told(others, [])}" if tested and others else ""
        return Finding(outcome, f"{what}: {numbers}", {k: one.seeds for k, one in tested.items()})

    return formula


def _told(values: Mapping[int, Measured], failed: Sequence[int], bound: float = math.nan) -> str:
    """Three values one by one; of more the highest, the last, and where they fail first.

    With its interval if the bound is in it: other seeds might decide otherwise.
    """

    def number(k: int) -> str:
        value, low, high = (short(one) for one in (values[k].value, *values[k][2:]))
        open_ = values[k].low <= bound <= values[k].high and low != high
        return f"{value} ({low} to {high})" if open_ else value

    if len(values) <= 3:
        return ", ".join(f"{number(k)} at {k:,}" for k in values)
    highest, end = max(values, key=lambda k: values[k].value), max(values)
    last = f"; {number(end)} at {end:,}" if highest != end else ""
    fails = f"; fails at {failed[0]:,} first" if failed else ""
    return f"at most {number(highest)}, at {highest:,}{last}{fails}"


def short(value: float) -> str:
    """Two significant digits."""
    if not math.isfinite(value):
        return "inf"
    rounded = float(f"{value:.1e}")
    if rounded == 0 or 1e-3 <= rounded < 1e4:
        return f"{rounded:g}"
    digits, _, power = f"{rounded:.1e}".partition("e")
    return f"{digits}e{int(power)}"


def either(*formulas: Callable[[str], Formula]) -> Formula:
    """All, by one reading of GL2O at least, of those that were run; then only such are told."""

    def judge(evidence: Evidence) -> Finding:
        several = [together(f(m)(evidence) for f in formulas) for m in evidence.run(GL2O)]
        return together([one for one in several if one.holds] or several)

    return judge


def loss(method: str) -> pl.Expr:
    """Loss(m, j) at the marks j up to k."""
    return pl.col(f"loss_{method}")


def least(method: str) -> pl.Expr:
    """The lowest of them, of ``MARKS``."""
    return loss(method).filter(pl.col("step").is_in([*MARKS])).min()


def divided(a: pl.Expr, b: pl.Expr) -> pl.Expr:
    """a / b, where a loss that is not finite is infinitely worse than any, its like included."""
    equal = a.is_finite() & (a == b)
    return pl.when(equal).then(1.0).otherwise(a / b).fill_nan(math.inf)


def over(a: str, *b: str) -> pl.Expr:
    """Loss(a) over the least of the others."""
    return divided(loss(a), pl.min_horizontal(map(loss, b)))


def from_first(method: str) -> pl.Expr:
    """Loss(m, k) over the loss at step 1."""
    return divided(loss(method), loss(method).first())


def ratio(
    a: str, b: Sequence[str], marks: Sequence[int], holds: str, bound: float, **more: Sequence[int]
) -> Formula:
    """``at_marks`` of Loss(a) over the least of the others'."""
    best = b[0] if len(b) == 1 else f"the best of {', '.join(b)}"
    return at_marks(f"{a} over {best}", over(a, *b), marks, holds, bound, **more)


def rises(method: str, k: int, holds: str = ">", **more: Sequence[int]) -> Formula:
    """Whether Loss(m, k) is above twice its least at a mark, or with "<=" isn't."""
    value = divided(loss(method), least(method))
    return at_marks(f"{method} over its least", value, [k], holds, 2, **more)


def above_first(method: str, k: int, holds: str, bound: float) -> Formula:
    """``at_marks`` of Loss(m, k) over its first loss."""
    return at_marks(f"{method} over its first loss", from_first(method), [k], holds, bound)


def diverges(method: str) -> Formula:
    """6a to 8b: above its first loss, or it rises."""
    value = divided(loss(method), pl.min_horizontal(loss(method).first(), 2 * least(method)))
    told = f"{method} over its first, or twice its least, loss"
    return at_marks(told, value, [1_000], ">", 1)


def tracks(last: int) -> Formula:
    """6c to 8c: LGL2O is not above its fallback at marks up to the last."""
    return ratio("LGL2O", ["SGDnm"], marks(100, last), "<=", 1.05, told=BEYOND)


def faster(name: str) -> Formula:
    """15, by one reading of GL2O."""
    worst = pl.max_horizontal(over("L2O", name), over("LGL2O", name), over(name, "SGDnm"))
    return at_marks(f"the worst of these ratios, with {name}", worst, marks(30, 3_000), "<", 1)


def counted(evidence: Evidence) -> Finding:
    """S3, by one reading of GL2O."""
    expected = {"LGL2O": (2, 2), evidence.run(GL2O)[0]: (2, 0)}
    return together(
        at_marks(f"{name} a step, {method}", pl.col(f"{name}_{method}"), [100], "=", count)(
            evidence
        )
        for method, counts in expected.items()
        for name, count in zip(("gradients", "forwards"), counts, strict=True)
    )


def marks(first: int, last: int) -> list[int]:
    return [k for k in MARKS if first <= k <= last]


_late = pl.col("step") > 0.9 * META_STEPS
_validation, _meta = loss("validation").filter(_late), loss("meta").filter(_late)
_begins = loss("meta").filter(pl.col("step") > 0).first()
_on, _not_on = ("fashion_mnist", "moons", "circles"), ("spirals", "cifar10")
_carried = divided(
    pl.max_horizontal(map(from_first, _on)), pl.min_horizontal(0.8, *map(from_first, _not_on))
)
_leads = pl.col("step").filter(over("L2O", "SGDnm", "Adam") < 1).max().fill_null(0)
_rank = 1 + pl.sum_horizontal(loss(m) < loss(CHOSEN) for m in PAPERS["fig10"]().names())
_tested = divided(pl.col("test_loss_L2O"), loss("L2O").first())
_over_adam = over("LGL2O over Adam 0.01", "LGL2O over SGDnm 3")  # its rate in the paper
_rises_late = [rises("LGL2O", K), rises(NC_100, K, "<=")]
_steady = rises("LGL2O", K, "<=", told=BEYOND)
# fmt: off
CLAIMS = [
    Claim("2a", "meta-training converges", ["lstm-mnist-mlp-paper"],
          [at_marks("last tenth of validation losses over the first",
                    divided(_validation.mean(), loss("validation").first()), [META_STEPS], "<",
                    0.5),
           at_marks("spread of that tenth",
                    divided(_validation.max() - _validation.min(), _validation.mean()),
                    [META_STEPS], "<", 0.1)]),
    Claim("2b", "L2O carries over to Fashion-MNIST, Moons, Circles, not to Spirals and CIFAR-10",
          ["fig02"],
          [*(at_marks(f"{'L2O over its first loss ' * (m == _on[0])}on {m}", from_first(m), [],
                      told=[100]) for m in (*_on, *_not_on)),
           at_marks("highest of three over the least of 0.8 and the others", _carried,
                    [100], "<", 1)]),
    Claim("3a", "L2O is the fastest at first", ["fig03"],
          [lambda e: at_marks("L2O over the best of the others",
                              over("L2O", "SGDnm", "Adam", *e.run(GL2O)), (30, 100, 300), "<",
                              1)(e),
           at_marks("last mark at which it leads SGDnm and Adam", _leads, [], told=[3_000])]),
    Claim("3b", "then L2O stops improving or diverges", ["fig03"],
          [ratio("L2O", ["SGDnm"], [K], ">", 1, told=BEYOND)]),
    Claim("3c", "LGL2O is as good as or better than either part at all times", ["fig03"],
          [ratio("LGL2O", PARTS, marks(30, K), "<=", 1.1, told=BEYOND)]),
    Claim("3d", "to step 100 GL2O is better than SGDnm and much worse than L2O", ["fig03"],
          [either(lambda m: ratio("L2O", [m], [100], "<", 0.7),
                  lambda m: ratio(m, ["SGDnm"], [100], "<", 1))]),
    Claim("3e", "LGL2O goes over to the fallback", ["fig03"],
          [at_marks("share of learned steps over the last tenth", pl.col("used_learned_LGL2O"),
                    [K], "<", 0.1)]),
    Claim("4a", "LGL2O is comparable to L2O early", ["fig04"],
          [ratio("LGL2O", ["L2O"], marks(100, 1_000), "<=", 1.5)]),
    Claim("4b", "L2O diverges later", ["fig04"], [rises("L2O", K, told=BEYOND)]),
    Claim("4c", "GL2O is behind L2O early", ["fig04"],
          [either(lambda m: ratio(m, ["L2O"], marks(100, 300), ">", 1))]),
    Claim("4d", "LGL2O itself rises late, for the noise of ten check minibatches", ["fig04"],
          [rises("LGL2O", 1_000_000, told=(K, 300_000)), rises(NC_100, 1_000_000, "<=")]),
    Claim("5a", "SGDnm stays on a plateau forever", ["fig05"],
          [ratio("SGDnm", ["LGL2O"], [50_000], ">", 3)]),
    Claim("5b", "Adam stays there very long", ["fig05"],
          [above_first("Adam 0.01", 1_000, ">", 0.5)]),
    Claim("5c", "LGL2O is as fast as L2O", ["fig05"],
          [ratio("LGL2O", ["L2O"], marks(30, 30_000), "<=", 1.5)]),
    Claim("5d", "after 50,000 steps LGL2O is better than both its parts", ["fig05"],
          [ratio("LGL2O", PARTS, [K], "<", 0.9, told=BEYOND)]),
    Claim("5e", "the loss of L2O rises considerably at first", ["fig05"],
          [at_marks("the highest loss so far over the first",
                    divided(loss("L2O").max(), loss("L2O").first()), [50], ">", 1.5)],
          where="section 4"),
    *(claim for n in (6, 7, 8) for claim in (
        Claim(f"{n}a", "L2O diverges very quickly", [f"fig{n:02}"], [diverges("L2O")]),
        Claim(f"{n}b", "GL2O diverges too", [f"fig{n:02}"], [either(diverges)]),
        Claim(f"{n}c", "LGL2O tracks its fallback", [f"fig{n:02}"], [tracks(K)]),
    )),
    Claim("9", "Adam is the better fallback on Spirals", ["fig09"],
          [at_marks("with Adam 0.01 as the fallback over with SGDnm", _over_adam, [120_000], "<",
                    1)]),
    Claim("10", "a grid over rate and decay chose 0.01 and 50,000", ["fig10"],
          [at_marks(f"rank of {CHOSEN} among 25", _rank, [1_000], "<=", 1)]),
    Claim("11a", "meta-training on CIFAR-10 + ConvNet goes from exploding to stable losses",
          ["cifar10-conv-plain"],
          [at_marks("first of the meta-losses over an optimizee's first loss",
                    divided(_begins, loss("first").first()), [META_STEPS], ">", 100),
           at_marks("highest of their last tenth",
                    divided(_meta.max(), loss("first").first()), [META_STEPS], "<", 1)]),
    Claim("11b", "its L2O carries over to other data and to the test set", ["fig13", "fig16"],
          [above_first("L2O", HORIZON, "<", 1), at_marks("on the test set", _tested, [1_000], "<",
                                                         1)]),
    Claim("12a", "L2O is stable, LGL2O is better in the end", ["fig12"],
          [at_marks("least of LGL2O over least of L2O", divided(least("LGL2O"), least("L2O")), [K],
                    "<", 1),
           at_marks("not judged: L2O over its least", divided(loss("L2O"), least("L2O")), [],
                    told=[K])]),
    Claim("12b", "LGL2O rises late, for the noise of the check", ["fig12"], _rises_late),
    Claim("13a", "until it rises LGL2O is better than both its parts", ["fig13"],
          [ratio("LGL2O", PARTS, marks(1_000, 30_000), "<", 1)]),
    Claim("13b", "LGL2O rises late, for the noise of the check", ["fig13"], _rises_late),
    Claim("14a", "SGDnm and GL2O get stuck, L2O and LGL2O do not", ["fig14"],
          [ratio("SGDnm", ["LGL2O"], [50_000], ">", 3),
           either(lambda m: ratio(m, ["LGL2O"], [50_000], ">", 3))]),
    Claim("14b", "LGL2O is better than L2O and keeps converging", ["fig14"],
          [ratio("LGL2O", ["L2O"], marks(10_000, K), "<", 1, told=BEYOND), _steady]),
    Claim("15", "L2O and LGL2O are faster than GL2O, all are faster than SGDnm", ["fig15"],
          [either(faster)]),
    Claim("16", "LGL2O is better than L2O, GL2O and SGDnm, and keeps it", ["fig16"],
          [either(lambda m: ratio("LGL2O", ["L2O", m, "SGDnm"], [K], "<", 1)), _steady]),
    Claim("S3", "2 gradients a step and 2 nc / nt forward passes; GL2O 2 gradients", ["fig03"],
          [counted], where="section 3"),
    Claim("A", "LGL2O is stable for millions of steps", ["fig03", "fig04", "fig05"],
          [rises("LGL2O", 1_000_000, "<="), rises(NC_100, 1_000_000, "<=")], where="abstract"),
]
