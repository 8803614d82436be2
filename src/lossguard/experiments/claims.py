"""The paper's claims, judged by records: reproduced, not reproduced or not run.

A row of ``CLAIMS`` is a statement of the paper and the formula that judges it. The fallback is
SGDnm, the very optimizer that the guards of a figure fall back to, run alone. ``docs/paper.md`` has
the verdicts.

Letters: m a method, k an optimizer step, K the step at which an end is judged.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import polars as pl

from .. import curves
from ..records import Record
from .evidence import MARKS, Evidence, FigureCurves, NotRunError, gather, mean_losses
from .formulas import (
    Finding,
    Formula,
    Measured,
    at_marks,
    divided,
    each,
    either,
    found,
    from_first,
    number,
    of_losses,
    on,
    on_each,
    over,
    ratio,
    rise,
    rises,
    short,
    together,
    values,
)
from .recipes import PAPERS

K = 100_000
"""Where the paper gives no length; what lies beyond is told beside the verdict."""
META_STEPS = 10_000
HORIZON = 600
"""Steps of a rollout of meta-training on CIFAR-10 + ConvNet."""
GL2O = ("GL2O", "GL2O (theta as decay)", "GL2O (every step)")
"""Readings of the rival: a claim about it is reproduced if it is so by one that was run."""
PARTS = ("L2O", "SGDnm")
NC_100 = "LGL2O (nc 100)"

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
    says: str
    judge: Callable[[Evidence], Finding]
    where: str = ""
    """The paper says it, if it isn't the caption of the figure that the name begins with."""


def judge_claims(
    records: Mapping[Path, Record], claims: Sequence[Claim] | None = None
) -> list[Verdict]:
    """Every claim once, in the paper's order, judged by the records of these folders.

    Those of other experiments are passed over. By default the claims are ``CLAIMS``.
    """
    evidence, chosen = gather(records), CLAIMS if claims is None else claims
    return [_verdict(one, found(one.judge, evidence)) for one in chosen]


def _verdict(claim: Claim, finding: Finding) -> Verdict:
    told, before = [], 0
    for k, count in sorted(finding.seeds.items()):
        if count != before:
            told.append(f"{count} from {k:,}" if told else f"{count}")
        before = count
    figure, mark = claim.where or claim.id.rstrip("abcde"), max(finding.seeds, default=0)
    seeds, outcome = ", ".join(told), OUTCOMES[finding.holds]
    return Verdict(claim.id, figure, claim.says, finding.numbers, seeds, mark, outcome)


def converges(evidence: Evidence) -> Finding:
    """2a, on the validation losses of the meta-training that is as the paper has it."""
    steps, losses, late = _meta_training(evidence, "lstm-mnist-mlp-paper", "validation")
    mean, tenth = losses.mean(axis=0), losses[:, late].mean(axis=0)
    ratio, spread = tenth.mean() / mean[0], (tenth.max() - tenth.min()) / tenth.mean()
    numbers = f"last tenth of {steps:,} meta-steps over the first: {short(ratio)}"
    numbers += f", spread {spread:.0%}"
    holds = bool(ratio < 0.5 and spread < 0.1) if steps >= META_STEPS else None
    return Finding(holds, numbers, {steps: len(losses)})


def explodes(evidence: Evidence) -> Finding:
    """11a, on the plain recipe."""
    steps, each, late = _meta_training(evidence, "cifar10-conv-plain", "meta_loss", after=0)
    losses, tenth = each.mean(axis=0), each[:, late].mean(axis=0)
    tables = evidence.meta["cifar10-conv-plain"].values()
    first = np.mean([table["validation"][0][0] for table in tables])
    numbers = (
        f"meta-loss over an optimizee's first loss: {short(losses[0] / first)} at first, "
        f"{short(tenth.mean() / first)} over the last tenth of {steps:,} meta-steps"
    )
    if steps < META_STEPS:
        return Finding(None, f"{numbers} of {META_STEPS:,}")
    holds = bool(losses[0] > 100 * first and (tenth < first).all())
    return Finding(holds, numbers, {steps: len(each)})


def _meta_training(
    evidence: Evidence, name: str, column: str, after: int = -1
) -> tuple[int, np.ndarray, np.ndarray]:
    """The number of meta-steps, losses [seeds, checks], and which checks are of the last tenth."""
    if name not in evidence.meta:
        raise NotRunError(f"no meta-training of {name}")
    each = (evidence.meta[name][seed] for seed in sorted(evidence.meta[name]))
    tables = [table.filter(pl.col("meta_step") > after) for table in each]
    steps = max((table["meta_step"].to_numpy() for table in tables), key=lambda own: own[-1])
    losses = [
        table[column].to_numpy().reshape(len(steps), -1).mean(axis=1)
        for table in tables
        if table["meta_step"].to_list() == steps.tolist()
    ]
    return int(steps[-1]), np.array(losses), steps > 0.9 * steps[-1]


def carries_over(figure: FigureCurves) -> Finding:
    """2b; a method is a data set here."""
    names = ("fashion_mnist", "moons", "circles", "spirals", "cifar10")
    measured = [from_first(name)(figure, 100) for name in names]
    ratios = [one.value for one in measured]
    told = ", ".join(f"{n} {short(one)}" for n, one in zip(names, ratios, strict=True))
    passes = max(ratios[:3]) < min(0.8, *ratios[3:])
    seeds = min(one.seeds for one in measured)
    return Finding(passes, f"at 100 over the first loss: {told}", {100: seeds})


def fastest(figure: FigureCurves) -> Finding:
    """3a, of all but LGL2O, which has L2O as a part."""
    others = ["SGDnm", "Adam", *figure.run(GL2O)]
    best = of_losses(over("L2O", *others))
    finding = at_marks("L2O over the best of the others", best, (30, 100, 300), "<", 1)(figure)
    leads = of_losses(over("L2O", "SGDnm", "Adam"))
    steps = range(30, min(figure.last("L2O", "SGDnm", "Adam"), 10_000) + 1, 10)
    ahead = [k for k in steps if leads(figure, k).value < 1]
    told = f"; ahead of SGDnm and Adam at {ahead[-1]:,} for the last time" if ahead else ""
    return finding._replace(numbers=finding.numbers + told)


def noise(figure: FigureCurves) -> Finding:
    """4d, 12b, 13b: LGL2O rises by K or later, for good, and with nc = 100 it doesn't there."""
    few = values(figure, rise("LGL2O"), MARKS) or {K: rise("LGL2O")(figure, K)}
    many, end = values(figure, rise(NC_100), MARKS), max(few)
    numbers = f"LGL2O over its least: {number(few[end], 2)} at {end:,}"
    late, seeds = [k for k in few if all(few[j].value > 2 for j in few if j >= k)], few[end].seeds
    if end < K or not late:
        return Finding(None if end < K else False, numbers, {end: seeds})
    numbers += f", above 2 from {late[0]:,} on; with nc 100: "
    if not many:
        return Finding(None, numbers + "no run", {end: seeds})
    last = max(many)
    steady = all(many[k].value <= 2 for k in many if k >= late[0]) if last >= late[0] else None
    numbers += f"{number(many[last], 2)} at {last:,}"
    return Finding(steady, numbers, {end: seeds, last: many[last].seeds})


def highest(figure: FigureCurves, k: int) -> Measured:
    """5e: the highest loss of L2O up to step k over the first."""
    seeds = figure.seeds(["L2O"], k)
    early = figure.of(["L2O"], seeds).filter(pl.col("step") <= k)
    losses = early.group_by("step").agg(pl.col("loss").mean()).sort("step")["loss"].to_numpy()
    losses = np.where(np.isfinite(losses), losses, np.inf)
    return Measured(curves.divided(float(losses.max()), float(losses[0])), len(seeds))


def diverges(method: str) -> Formula:
    """6a to 8b: above its first loss, or it rises."""

    def formula(figure: FigureCurves) -> Finding:
        finding = above_first(method, 1)(figure)
        return finding._replace(holds=finding.holds or rise(method)(figure, 1_000).value > 2)

    return formula


def tracks(last: int) -> Formula:
    """6c to 8c: LGL2O is not above its fallback at marks up to the last."""
    return ratio("LGL2O", ["SGDnm"], marks(100, last), "<=", 1.05, beyond=True)


def above_first(method: str, bound: float) -> Formula:
    """Whether Loss(method, 1,000) over its first loss is above a bound."""
    return at_marks(f"{method} over its first loss", from_first(method), [1_000], ">", bound)


def grid(figure: FigureCurves) -> Finding:
    """10: the rank of 0.01 and 50,000 where all settings end, and who leads where some go on."""
    methods, chosen = PAPERS["fig10"]().methods, "SGDnm 0.01 tau 50000"
    k, later = figure.last(*methods), max(figure.last(m) for m in methods)
    of_each = figure.of_seeds(methods, k)
    of = mean_losses(of_each).row(-1, named=True)
    order = sorted(methods, key=lambda m: of[m])
    spread = curves.divided(of[order[-1]], of[order[0]]) - 1
    numbers = (
        f"{chosen} is number {order.index(chosen) + 1} of {len(methods)} at {k:,}; the best is "
        f"{order[0]}, the worst {spread:.1%} above it"
    )
    if went_on := [m for m in methods if figure.last(m) == later > k]:
        more = mean_losses(figure.of_seeds(went_on, later)).row(-1, named=True)
        best = min(went_on, key=lambda m: more[m])
        numbers += f"; of {len(went_on)} that went on to {later:,} the best is {best}"
    return Finding(order[0] == chosen, numbers, {k: of_each["seed"].n_unique()})


def after_its_horizon(figure: FigureCurves) -> Finding:
    """11b, on one data set."""
    ratio, seeds, _ = from_first("L2O")(figure, HORIZON)
    step, tested = figure.tested("L2O", HORIZON)
    losses = mean_losses(figure.of_seeds(["L2O"], HORIZON, [1]))
    on_test = curves.divided(tested, losses["L2O"][0])
    numbers = f"L2O over its first loss: {short(ratio)} at {HORIZON}, on the test set "
    numbers += f"{short(on_test)} at {step:,}"
    return Finding(max(ratio, on_test) < 1, numbers, {HORIZON: seeds})


def faster(name: str) -> Formula:
    """15, by one reading of GL2O."""
    worst = pl.max_horizontal(over("L2O", name), over("LGL2O", name), over(name, "SGDnm"))
    what = f"the worst of these ratios, with {name}"
    return at_marks(what, of_losses(worst), marks(30, 3_000), "<", 1)


def counted(evidence: Evidence) -> Finding:
    """S3, on the first figure that has both guards."""
    for name, figure in sorted(evidence.figures.items()):
        rival = figure.run(GL2O)[0]
        if {"LGL2O", rival} <= figure.curves.keys():
            counts = *figure.spent("LGL2O"), *figure.spent(rival)
            told = "LGL2O {:.3g} gradients and {:.3g} forward passes, GL2O {:.3g} and {:.3g}"
            e = PAPERS[name]()
            holds = np.allclose(counts, (2, 2 * e.nc / e.nt, 2, 0), atol=1e-3)
            return Finding(bool(holds), f"a step of {name}: {told.format(*counts)}")
    raise NotRunError("no run has LGL2O and GL2O")


def million(evidence: Evidence) -> Finding:
    """A."""
    steady = (rises(m, 1_000_000, "<=") for m in ("LGL2O", NC_100))
    return together(on_each([3, 4, 5], one)(evidence) for one in steady)


def beside(formula: Formula) -> Formula:
    """What it finds is told, and decides nothing."""

    def told(figure: FigureCurves) -> Finding:
        finding = found(formula, figure)
        return Finding(True, f"not judged: {finding.numbers}", finding.seeds)

    return told


def marks(first: int, last: int) -> list[int]:
    return [k for k in MARKS if first <= k <= last]


_least = of_losses(divided(pl.col("LGL2O").min(), pl.col("L2O").min()), MARKS)
_share = "share of learned steps over the last tenth"
_with_adam = "with Adam 0.01 as the fallback over with SGDnm"
_over_adam = of_losses(over("LGL2O over Adam 0.01", "LGL2O over SGDnm 3"))  # its rate in the paper
_steady = rises("LGL2O", K, "<=")
# fmt: off
CLAIMS = [
    Claim("2a", "meta-training converges", converges),
    Claim("2b", "L2O carries over to Fashion-MNIST, Moons, Circles, not to Spirals and CIFAR-10",
          on(2, carries_over)),
    Claim("3a", "L2O is the fastest at first", on(3, fastest)),
    Claim("3b", "then L2O stops improving or diverges",
          on(3, ratio("L2O", ["SGDnm"], [K], ">", 1, beyond=True))),
    Claim("3c", "LGL2O is as good as or better than either part at all times",
          on(3, ratio("LGL2O", PARTS, marks(30, K), "<=", 1.1, beyond=True))),
    Claim("3d", "to step 100 GL2O is better than SGDnm and much worse than L2O",
          on(3, either(GL2O, lambda one: each(ratio("L2O", [one], [100], "<", 0.7),
                                              ratio(one, ["SGDnm"], [100], "<", 1))))),
    Claim("3e", "LGL2O goes over to the fallback",
          on(3, at_marks(_share, lambda f, k: Measured(*f.share("LGL2O", 0.9 * k, k)), [K], "<",
                         0.1))),
    Claim("4a", "LGL2O is comparable to L2O early",
          on(4, ratio("LGL2O", ["L2O"], marks(100, 1_000), "<=", 1.5))),
    Claim("4b", "L2O diverges later", on(4, rises("L2O", K))),
    Claim("4c", "GL2O is behind L2O early",
          on(4, either(GL2O, lambda m: ratio(m, ["L2O"], marks(100, 300), ">", 1)))),
    Claim("4d", "LGL2O itself rises late, for the noise of ten check minibatches", on(4, noise)),
    Claim("5a", "SGDnm stays on a plateau forever",
          on(5, ratio("SGDnm", ["LGL2O"], [50_000], ">", 3))),
    Claim("5b", "Adam stays there very long", on(5, above_first("Adam 0.01", 0.5))),
    Claim("5c", "LGL2O is as fast as L2O",
          on(5, ratio("LGL2O", ["L2O"], marks(30, 30_000), "<=", 1.5))),
    Claim("5d", "after 50,000 steps LGL2O is better than both its parts",
          on(5, ratio("LGL2O", PARTS, [K], "<", 0.9, beyond=True))),
    Claim("5e", "the loss of L2O rises considerably at first",
          on(5, at_marks("the highest loss so far over the first", highest, [50], ">", 1.5)),
          where="section 4"),
    *(claim for n in (6, 7, 8) for claim in (
        Claim(f"{n}a", "L2O diverges very quickly", on(n, diverges("L2O"))),
        Claim(f"{n}b", "GL2O diverges too", on(n, either(GL2O, diverges))),
        Claim(f"{n}c", "LGL2O tracks its fallback", on(n, tracks(K))),
    )),
    Claim("9", "Adam is the better fallback on Spirals",
          on(9, at_marks(_with_adam, _over_adam, [120_000], "<", 1))),
    Claim("10", "a grid over rate and decay chose 0.01 and 50,000", on(10, grid)),
    Claim("11a", "meta-training on CIFAR-10 + ConvNet goes from exploding to stable losses",
          explodes),
    Claim("11b", "its L2O carries over to other data and to the test set",
          on_each([13, 16], after_its_horizon)),
    Claim("12a", "L2O is stable, LGL2O is better in the end",
          on(12, at_marks("least of LGL2O over least of L2O", _least, [K], "<", 1),
             beside(rises("L2O", K)))),
    Claim("12b", "LGL2O rises late, for the noise of the check", on(12, noise)),
    Claim("13a", "until it rises LGL2O is better than both its parts",
          on(13, ratio("LGL2O", PARTS, marks(1_000, 30_000), "<", 1))),
    Claim("13b", "LGL2O rises late, for the noise of the check", on(13, noise)),
    Claim("14a", "SGDnm and GL2O get stuck, L2O and LGL2O do not",
          on(14, ratio("SGDnm", ["LGL2O"], [50_000], ">", 3),
             either(GL2O, lambda one: ratio(one, ["LGL2O"], [50_000], ">", 3)))),
    Claim("14b", "LGL2O is better than L2O and keeps converging",
          on(14, ratio("LGL2O", ["L2O"], marks(10_000, K), "<", 1, beyond=True), _steady)),
    Claim("15", "L2O and LGL2O are faster than GL2O, all are faster than SGDnm",
          on(15, either(GL2O, faster))),
    Claim("16", "LGL2O is better than L2O, GL2O and SGDnm, and keeps it",
          on(16, ratio("LGL2O", ["L2O", "GL2O", "SGDnm"], [K], "<", 1), _steady)),
    Claim("S3", "2 gradients a step and 2 nc / nt forward passes; GL2O 2 gradients", counted,
          where="section 3"),
    Claim("A", "LGL2O is stable for millions of steps", million, where="abstract"),
]
