"""The paper's claims, judged by records: reproduced, not reproduced or not run.

The fallback is SGDnm, the very optimizer that the guards of a figure fall back to, run alone.
``docs/paper.md`` has the verdicts.

Letters: k an optimizer step, K the step at which an end is judged.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import polars as pl

from ..curves import divided
from ..records import Record
from .evidence import MARKS, Evidence, Figure, NotRunError, gather
from .formulas import (
    Finding,
    Formula,
    all_of,
    at_marks,
    each,
    either,
    found,
    from_first,
    over,
    ratio_of,
    rises,
    short,
)
from .recipes import PAPERS

K = 100_000
"""Where the paper gives no length; what lies beyond is told beside the verdict."""
META_STEPS = 10_000
HORIZON = 600
"""Steps of a rollout of meta-training on CIFAR-10 + ConvNet."""
GL2O = ("GL2O", "GL2O (theta as decay)", "GL2O (mu of every step)")
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


def _on(number: int, formula: Formula) -> Callable[[Evidence], Finding]:
    """A formula on the curves of a figure."""
    return lambda evidence: formula(evidence.figure(f"fig{number:02}"))


def _on_each(numbers: Sequence[int], formula: Formula) -> Callable[[Evidence], Finding]:
    """On each of several figures."""

    def judge(evidence: Evidence) -> Finding:
        several = {n: found(lambda n=n: _on(n, formula)(evidence)) for n in numbers}
        told = (one._replace(numbers=f"fig{n:02}: {one.numbers}") for n, one in several.items())
        return all_of(told)

    return judge


def _marks(first: int, last: int) -> list[int]:
    return [k for k in MARKS if first <= k <= last]


def _converges(evidence: Evidence) -> Finding:
    """2a, on validation losses."""
    curves = evidence.meta_training("lstm-mnist-mlp")
    steps, losses = curves["meta_step"].to_numpy(), curves["validation"].to_numpy().mean(axis=1)
    tenth = losses[steps > 0.9 * steps[-1]]
    ratio, spread = tenth.mean() / losses[0], (tenth.max() - tenth.min()) / tenth.mean()
    numbers = f"last tenth of {steps[-1]:,} meta-steps over the first: {short(ratio)}"
    return Finding(bool(ratio < 0.5 and spread < 0.1), f"{numbers}, spread {spread:.0%}")


def _carries_over(figure: Figure) -> Finding:
    """2b; a method is a data set here."""
    names = ("fashion_mnist", "moons", "circles", "spirals", "cifar10")
    ratios = {name: figure.over_first(name, 100) for name in names}
    known = max(ratios[name][0] for name in names[:3])
    other = min(ratios[name][0] for name in names[3:])
    numbers = ", ".join(f"{name} {short(ratio)}" for name, (ratio, _) in ratios.items())
    seeds = min(seeds for _, seeds in ratios.values())
    passes = known < other and known < 0.8
    return Finding(passes, f"at 100 over the first loss: {numbers}", {100: seeds})


def _fastest(figure: Figure) -> Finding:
    """3a, of all but LGL2O, which has L2O as a part."""
    others = ["SGDnm", "Adam", *(m for m in GL2O[1:] if figure.has(m)), "GL2O"]
    finding = ratio_of("L2O", others, (30, 100, 300), "<", 1)(figure)
    alone = ["L2O", "SGDnm", "Adam"]
    steps = range(30, min(figure.last(*alone), 10_000) + 1, 10)
    ahead = [k for k in steps if over(*alone)(figure.losses(alone, k).of) < 1]
    led = f"; ahead of SGDnm and Adam at {max(ahead):,} for the last time" if ahead else ""
    return finding._replace(numbers=finding.numbers + led)


def _early_price(name: str) -> Formula:
    """3d, by one reading of GL2O."""
    return each(ratio_of("L2O", [name], [100], "<", 0.7), ratio_of(name, ["SGDnm"], [100], "<", 1))


def _goes_over(figure: Figure) -> Finding:
    """3e."""
    share, seeds = figure.share("LGL2O", 0.9 * K, K)
    numbers = f"share of learned steps from {int(0.9 * K):,} to {K:,}: {share:.2g}"
    return Finding(share < 0.1, numbers, {K: seeds})


def _noise(figure: Figure) -> Finding:
    """4d, 12b, 13b: LGL2O rises by K or later, for good, and with nc = 100 it doesn't there."""
    few, many = (
        {k: figure.rise(method, k) for k in MARKS if figure.seeds([method], k)}
        for method in ("LGL2O", NC_100)
    )
    if not few:
        raise NotRunError("no run has LGL2O")
    end, last = max(few), max(many, default=0)
    numbers = f"LGL2O over its least so far: {short(few[end][0])} at {end:,}"
    late = [k for k in few if all(few[j][0] > 2 for j in few if j >= k)]
    if not late:
        return Finding(False if end >= K else None, numbers, {end: few[end][1]})
    told = f"{short(many[last][0])} at {last:,}" if many else "no run"
    steady = all(many[k][0] <= 2 for k in many if k >= late[0]) if last >= late[0] else None
    seeds = {end: few[end][1]} | ({last: many[last][1]} if many else {})
    return Finding(steady, f"{numbers}, above 2 from {late[0]:,} on; with nc 100: {told}", seeds)


def _rises_at_first(figure: Figure) -> Finding:
    """5e."""
    _, seeds = figure.over_first("L2O", 50)
    early = figure.curves.filter(pl.col("method") == "L2O", pl.col("step") <= 50)
    losses = early.group_by("step").agg(pl.col("loss").mean()).sort("step")["loss"].to_numpy()
    ratio = float(losses.max() / losses[0])
    numbers = f"the highest loss of 50 steps over the first: {short(ratio)}"
    return Finding(ratio > 1.5, numbers, {50: seeds})


def _diverges(method: str) -> Formula:
    """6a to 8b."""
    return from_first(method, 1_000, 1, or_rises=True)


def _grid(figure: Figure) -> Finding:
    """10: the rank of 0.01 and 50,000 where all settings end, and who leads where some go on."""
    methods, chosen = PAPERS["fig10"]().methods, "SGDnm 0.01 tau 50000"
    k = figure.last(*methods)
    losses = figure.losses(methods, k)
    order = sorted(methods, key=lambda m: losses.of[m])
    spread = divided(losses.of[order[-1]], losses.of[order[0]]) - 1
    numbers = (
        f"{chosen} is number {order.index(chosen) + 1} of {len(methods)} at {k:,}; the best is "
        f"{order[0]}, the worst {spread:.1%} above it"
    )
    later = max(figure.last(m) for m in methods)
    if went_on := [m for m in methods if figure.last(m) == later > k]:
        more = figure.losses(went_on, later).of
        best = min(went_on, key=lambda m: more[m])
        numbers += f"; of {len(went_on)} that went on to {later:,} the best is {best}"
    return Finding(order[0] == chosen, numbers, {k: losses.seeds})


def _explodes(evidence: Evidence) -> Finding:
    """11a, on the plain recipe."""
    curves = evidence.meta_training("cifar10-conv-plain")
    steps, losses = curves["meta_step"].to_numpy(), curves["meta_loss"].to_numpy()
    initial = float(curves["validation"].to_numpy()[0][0])
    tenth = losses[steps > 0.9 * steps[-1]]
    numbers = (
        f"meta-loss over an optimizee's first loss: {short(losses[0] / initial)} at first, "
        f"{short(tenth.mean() / initial)} over the last tenth of {steps[-1]:,} meta-steps"
    )
    if steps[-1] < META_STEPS:
        return Finding(None, f"{numbers} of {META_STEPS:,}")
    return Finding(bool(losses[0] > 100 * initial and (tenth < initial).all()), numbers)


def _after_its_horizon(figure: Figure) -> Finding:
    """11b, on one data set."""
    ratio, seeds = figure.over_first("L2O", HORIZON)
    step, tested = figure.tested("L2O", HORIZON)
    on_test = divided(tested, figure.losses(["L2O"], 1, seeds_at=HORIZON).of["L2O"])
    numbers = f"L2O over its first loss: {short(ratio)} at {HORIZON}, on the test set "
    return Finding(
        max(ratio, on_test) < 1, numbers + f"{short(on_test)} at {step:,}", {HORIZON: seeds}
    )


def _better_in_the_end(figure: Figure) -> Finding:
    """12a."""
    both = ("LGL2O", "L2O")
    losses = [figure.losses(both, k, seeds_at=K) for k in _marks(30, K)]
    ours, theirs = (min(one.of[m] for one in losses) for m in both)
    ratio = divided(ours, theirs)
    numbers = f"least of LGL2O over least of L2O: {short(ratio)}"
    return Finding(ratio < 1, numbers, {K: losses[-1].seeds})


def _faster(name: str) -> Formula:
    """15, by one reading of GL2O."""

    def worst(of: Mapping[str, float]) -> float:
        return max(*(divided(of[m], of[name]) for m in ("L2O", "LGL2O")), over(name, "SGDnm")(of))

    what = f"the worst of L2O and LGL2O over {name} and {name} over SGDnm"
    return at_marks(what, worst, ["L2O", "LGL2O", name, "SGDnm"], _marks(30, 3_000), "<", 1)


def _counted(evidence: Evidence) -> Finding:
    """S3, on the first figure that has both guards."""
    for name, figure in sorted(evidence.figures.items()):
        if figure.has("LGL2O", "GL2O"):
            ours, theirs = figure.spent("LGL2O"), figure.spent("GL2O")
            counts = ours["gradients"], ours["forwards"], theirs["gradients"], theirs["forwards"]
            numbers = (
                "a step of {}: LGL2O {:.3g} gradients and {:.3g} forward passes, GL2O {:.3g} and "
                "{:.3g}".format(name, *counts)
            )
            expected = 2, 2 * figure.nc / figure.nt, 2, 0
            return Finding(bool(np.allclose(counts, expected, atol=1e-3)), numbers)
    raise NotRunError("no run has LGL2O and GL2O")


def _million(evidence: Evidence) -> Finding:
    """A."""
    steady = (rises(method, 1_000_000, expected=False) for method in ("LGL2O", NC_100))
    return all_of(_on_each([3, 4, 5], formula)(evidence) for formula in steady)


_behind = either(GL2O, lambda m: ratio_of(m, ["L2O"], _marks(100, 300), ">", 1))
_tracks = ratio_of("LGL2O", ["SGDnm"], _marks(100, K), "<=", 1.05, beyond=True)
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
_ahead = ratio_of("LGL2O", ["L2O"], _marks(10_000, K), "<", 1, beyond=True)
_best = ratio_of("LGL2O", ["L2O", "GL2O", "SGDnm"], [K], "<", 1)
_all_times = ratio_of("LGL2O", PARTS, _marks(30, K), "<=", 1.1, beyond=True)

TABLE: Sequence[tuple[str, str, Callable[[Evidence], Finding]]] = [
    ("2a", "meta-training converges", _converges),
    (
        "2b",
        "L2O carries over to Fashion-MNIST, Moons, Circles, not to Spirals and CIFAR-10",
        _on(2, _carries_over),
    ),
    ("3a", "L2O is the fastest at first", _on(3, _fastest)),
    (
        "3b",
        "then L2O stops improving or diverges",
        _on(3, ratio_of("L2O", ["SGDnm"], [K], ">", 1, beyond=True)),
    ),
    ("3c", "LGL2O is as good as or better than either part at all times", _on(3, _all_times)),
    (
        "3d",
        "to step 100 GL2O is better than SGDnm and much worse than L2O",
        _on(3, either(GL2O, _early_price)),
    ),
    ("3e", "LGL2O goes over to the fallback", _on(3, _goes_over)),
    (
        "4a",
        "LGL2O is comparable to L2O early",
        _on(4, ratio_of("LGL2O", ["L2O"], _marks(100, 1_000), "<=", 1.5)),
    ),
    ("4b", "L2O diverges later", _on(4, rises("L2O", K, expected=True))),
    ("4c", "GL2O is behind L2O early", _on(4, _behind)),
    ("4d", "LGL2O itself rises late, for the noise of ten check minibatches", _on(4, _noise)),
    (
        "5a",
        "SGDnm stays on a plateau forever",
        _on(5, ratio_of("SGDnm", ["LGL2O"], [50_000], ">", 3)),
    ),
    ("5b", "Adam stays there very long", _on(5, from_first("Adam 0.01", 1_000, 0.5))),
    (
        "5c",
        "LGL2O is as fast as L2O",
        _on(5, ratio_of("LGL2O", ["L2O"], _marks(30, 30_000), "<=", 1.5)),
    ),
    (
        "5d",
        "after 50,000 steps LGL2O is better than both its parts",
        _on(5, ratio_of("LGL2O", PARTS, [K], "<", 0.9, beyond=True)),
    ),
    ("5e", "the loss of L2O rises considerably at first", _on(5, _rises_at_first)),
    *(
        row
        for n in (6, 7, 8)
        for row in (
            (f"{n}a", "L2O diverges very quickly", _on(n, _diverges("L2O"))),
            (f"{n}b", "GL2O diverges too", _on(n, either(GL2O, _diverges))),
            (f"{n}c", "LGL2O tracks its fallback", _on(n, _tracks)),
        )
    ),
    ("9", "Adam is the better fallback on Spirals", _on(9, _over_adam)),
    ("10", "a grid over rate and decay chose 0.01 and 50,000", _on(10, _grid)),
    (
        "11a",
        "meta-training on CIFAR-10 + ConvNet goes from exploding to stable losses",
        _explodes,
    ),
    (
        "11b",
        "its L2O carries over to other data and to the test set",
        _on_each([13, 16], _after_its_horizon),
    ),
    ("12a", "L2O is stable, LGL2O is better in the end", _on(12, _better_in_the_end)),
    ("12b", "LGL2O rises late, for the noise of the check", _on(12, _noise)),
    (
        "13a",
        "until it rises LGL2O is better than both its parts",
        _on(13, ratio_of("LGL2O", PARTS, _marks(1_000, 30_000), "<", 1)),
    ),
    ("13b", "LGL2O rises late, for the noise of the check", _on(13, _noise)),
    ("14a", "SGDnm and GL2O get stuck, L2O and LGL2O do not", _on(14, _stuck)),
    ("14b", "LGL2O is better than L2O and keeps converging", _on(14, each(_ahead, _steady))),
    (
        "15",
        "L2O and LGL2O are faster than GL2O, all are faster than SGDnm",
        _on(15, either(GL2O, _faster)),
    ),
    (
        "16",
        "LGL2O is better than L2O, GL2O and SGDnm, and keeps it",
        _on(16, each(_best, _steady)),
    ),
    ("S3", "2 gradients a step and 2 nc / nt forward passes; GL2O 2 gradients", _counted),
    ("A", "LGL2O is stable for millions of steps", _million),
]
"""Name, what the paper says, what judges it."""
ELSEWHERE = {"5e": "section 4", "S3": "section 3", "A": "abstract"}
"""Where the paper says it, if it isn't the caption of the figure that the name begins with."""
CLAIMS = [
    Claim(id, ELSEWHERE.get(id, id.rstrip("abcde")), says, judge) for id, says, judge in TABLE
]
