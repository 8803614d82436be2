"""The paper's claims as formulas over records: reproduced, not reproduced or not run.

The fallback is SGDnm, the very optimizer that the guards of a figure fall back to, run alone. What
a formula compares, and what rises, is in ``evidence.py``; ``docs/paper.md`` has the verdicts.

Letters: k an optimizer step, K the step at which an end is judged.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import polars as pl

from ..curves import divided
from ..records import Record
from .evidence import (
    MARKS,
    Evidence,
    Figure,
    Finding,
    Formula,
    above,
    all_of,
    at_marks,
    below,
    each,
    either,
    from_first,
    gather,
    over,
    ratio_of,
    rise,
    rises,
    short,
    tested,
    up_to,
)
from .recipes import PAPERS

K = 100_000
"""Where the paper gives no length; what lies beyond is told beside the verdict."""
K_9, MILLION = 120_000, 1_000_000
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


def judge_claims(records: Mapping[Path, Record]) -> list[Verdict]:
    """Every claim once, in the paper's order, judged by the records of these folders.

    Those of other experiments are passed over.
    """
    evidence = gather(records)
    return [_verdict(claim, claim.judge(evidence)) for claim in CLAIMS]


def _verdict(claim: "Claim", found: Finding) -> Verdict:
    told, before = [], 0
    for k, count in sorted(found.seeds.items()):
        if count != before:
            told.append(f"{count} from {k:,}" if told else f"{count}")
        before = count
    mark = max(found.seeds, default=0)
    return Verdict(*claim[:3], found.numbers, ", ".join(told), mark, OUTCOMES[found.holds])


class Claim(NamedTuple):
    """What the paper says, and what judges it."""

    id: str
    figure: str
    says: str
    judge: Callable[[Evidence], Finding]


def _on(name: str, formula: Formula) -> Callable[[Evidence], Finding]:
    """A formula on the curves of a figure."""

    def judge(evidence: Evidence) -> Finding:
        if name not in evidence.figures:
            return Finding(None, f"no run of {name}")
        return formula(evidence.figures[name])

    return judge


def _on_each(names: Sequence[str], formula: Formula) -> Callable[[Evidence], Finding]:
    """On each of several figures."""

    def judge(evidence: Evidence) -> Finding:
        found = [(name, _on(name, formula)(evidence)) for name in names]
        return all_of(one._replace(numbers=f"{name}: {one.numbers}") for name, one in found)

    return judge


def _marks(first: int, last: int) -> list[int]:
    return [k for k in MARKS if first <= k <= last]


def _converges(evidence: Evidence) -> Finding:
    """2a, on validation losses."""
    if "lstm-mnist-mlp" not in evidence.meta:
        return Finding(None, "no meta-training of lstm-mnist-mlp")
    curves = evidence.meta["lstm-mnist-mlp"].curves
    steps, losses = curves["meta_step"].to_numpy(), curves["validation"].to_numpy().mean(axis=1)
    tenth = losses[steps > 0.9 * steps[-1]]
    ratio, spread = tenth.mean() / losses[0], (tenth.max() - tenth.min()) / tenth.mean()
    numbers = f"last tenth of {steps[-1]:,} meta-steps over the first: {short(ratio)}"
    return Finding(bool(ratio < 0.5 and spread < 0.1), f"{numbers}, spread {spread:.0%}")


def _carries_over(figure: Figure) -> Finding:
    """2b; a method is a data set here."""
    names = ("fashion_mnist", "moons", "circles", "spirals", "cifar10")
    found = {name: figure.over_first(name, 100) for name in names}
    if missing := [name for name, one in found.items() if not one]:
        return Finding(None, f"{', '.join(missing)} was not run to 100")
    ratios = {name: one.of[name] for name, one in found.items() if one}
    known, other = max(ratios[name] for name in names[:3]), min(ratios[name] for name in names[3:])
    numbers = ", ".join(f"{name} {short(ratio)}" for name, ratio in ratios.items())
    seeds = min(one.seeds for one in found.values() if one)
    return Finding(
        known < other and known < 0.8, f"at 100 over the first loss: {numbers}", {100: seeds}
    )


def _fastest(figure: Figure) -> Finding:
    """3a, of all but LGL2O, which has L2O as a part."""
    others = ["SGDnm", "Adam", *(m for m in GL2O[1:] if figure.has(m)), "GL2O"]
    found = ratio_of("L2O", others, (30, 100, 300), below(1))(figure)
    alone = ["L2O", "SGDnm", "Adam"]
    steps = range(30, min(figure.last(*alone), 10_000) + 1, 10) if figure.has(*alone) else ()
    ahead = [k for k in steps if (one := figure.losses(alone, k)) and over(*alone)(one.of) < 1]
    led = f"; ahead of SGDnm and Adam at {max(ahead):,} for the last time" if ahead else ""
    return found._replace(numbers=found.numbers + led)


def _early_price(name: str) -> Formula:
    """3d, by one reading of GL2O."""
    return each(
        ratio_of("L2O", [name], [100], below(0.7)),
        ratio_of(name, ["SGDnm"], [100], below(1)),
    )


def _goes_over(figure: Figure) -> Finding:
    """3e."""
    found = figure.share("LGL2O", 0.9 * K, K) if figure.has("LGL2O") else None
    if found is None:
        return Finding(None, f"LGL2O was not run to {K:,}")
    numbers = f"share of learned steps from {int(0.9 * K):,} to {K:,}: {found[0]:.2g}"
    return Finding(found[0] < 0.1, numbers, {K: found[1]})


def _noise(figure: Figure) -> Finding:
    """4d, 12b, 13b: LGL2O rises by K or later, for good, and with nc = 100 it doesn't there."""
    few = {k: found for k in MARKS if (found := rise(figure, "LGL2O", k))}
    many = {k: found for k in MARKS if (found := rise(figure, NC_100, k))}
    if not few:
        return Finding(None, "no run has LGL2O")
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
    found = figure.over_first("L2O", 50)
    if not found:
        return Finding(None, "L2O was not run to 50")
    early = figure.curves.filter(pl.col("method") == "L2O", pl.col("step") <= 50)
    losses = early.group_by("step").agg(pl.col("loss").mean()).sort("step")["loss"].to_numpy()
    ratio = float(losses.max() / losses[0])
    numbers = f"the highest loss of 50 steps over the first: {short(ratio)}"
    return Finding(ratio > 1.5, numbers, {50: found.seeds})


def _diverges(method: str) -> Formula:
    """6a to 8b."""
    return from_first(method, 1_000, above(1), or_rises=True)


def _fallbacks(figure: Figure) -> Finding:
    """9, at Adam's rate in the paper."""
    adam, sgd = "LGL2O over Adam 0.01", ["LGL2O over SGDnm 3"]
    what = "with Adam 0.01 as the fallback over with SGDnm"
    return ratio_of(adam, sgd, [K_9], below(1), what=what)(figure)


def _grid(figure: Figure) -> Finding:
    """10: the rank of 0.01 and 50,000 where all settings end, and who leads where some go on."""
    methods, chosen = PAPERS["fig10"]().methods, "SGDnm 0.01 tau 50000"
    k = figure.last(*methods)
    if not (losses := figure.losses(methods, k)):
        return Finding(None, "no run has the whole grid")
    order = sorted(methods, key=lambda m: losses.of[m])
    spread = divided(losses.of[order[-1]], losses.of[order[0]]) - 1
    numbers = (
        f"{chosen} is number {order.index(chosen) + 1} of {len(methods)} at {k:,}; the best is "
        f"{order[0]}, the worst {spread:.1%} above it"
    )
    later = max(figure.last(m) for m in methods)
    went_on = [m for m in methods if figure.last(m) == later > k]
    if went_on and (more := figure.losses(went_on, later)):
        best = min(went_on, key=lambda m: more.of[m])
        numbers += f"; of {len(went_on)} that went on to {later:,} the best is {best}"
    return Finding(order[0] == chosen, numbers, {k: losses.seeds})


def _explodes(evidence: Evidence) -> Finding:
    """11a, on the plain recipe."""
    name = "cifar10-conv-plain"
    if name not in evidence.meta:
        return Finding(None, f"no meta-training of {name}")
    curves = evidence.meta[name].curves
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
    found, held_out = figure.over_first("L2O", HORIZON), tested(figure, "L2O", HORIZON)
    start = figure.losses(["L2O"], 1, seeds_at=HORIZON)
    if not (found and held_out and start):
        return Finding(None, f"L2O was not run and tested to {HORIZON}")
    ratios = found.of["L2O"], divided(held_out[1], start.of["L2O"])
    numbers = f"L2O over its first loss: {short(ratios[0])} at {HORIZON}, on the test set "
    numbers += f"{short(ratios[1])} at {held_out[0]:,}"
    return Finding(max(ratios) < 1, numbers, {HORIZON: found.seeds})


def _better_in_the_end(figure: Figure) -> Finding:
    """12a."""
    both = ("LGL2O", "L2O")
    losses = [one for k in _marks(30, K) if (one := figure.losses(both, k, seeds_at=K))]
    if not losses:
        return Finding(None, f"LGL2O and L2O were not run to {K:,}")
    ours, theirs = (min(one.of[m] for one in losses) for m in both)
    ratio = divided(ours, theirs)
    numbers = f"least of LGL2O over least of L2O: {short(ratio)}"
    return Finding(ratio < 1, numbers, {K: losses[-1].seeds})


def _faster(name: str) -> Formula:
    """15, by one reading of GL2O."""

    def worst(of: Mapping[str, float]) -> float:
        return max(*(divided(of[m], of[name]) for m in ("L2O", "LGL2O")), over(name, "SGDnm")(of))

    what = f"the worst of L2O and LGL2O over {name} and {name} over SGDnm"
    return at_marks(
        _marks(30, 3_000), what, ["L2O", "LGL2O", name, "SGDnm"], worst, lambda r: r < 1
    )


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
    return Finding(None, "no run has LGL2O and GL2O")


def _million(evidence: Evidence) -> Finding:
    """A."""
    found = []
    for method in ("LGL2O", NC_100):
        steady = rises(method, MILLION, expected=False)
        found.append(_on_each(["fig03", "fig04", "fig05"], steady)(evidence))
    return all_of(found)


SAYS: Mapping[str, tuple[str, str]] = {
    "2a": ("2", "meta-training converges"),
    "2b": ("2", "L2O carries over to Fashion-MNIST, Moons, Circles, not to Spirals and CIFAR-10"),
    "3a": ("3", "L2O is the fastest at first"),
    "3b": ("3", "then L2O stops improving or diverges"),
    "3c": ("3", "LGL2O is as good as or better than either part at all times"),
    "3d": ("3", "to step 100 GL2O is better than SGDnm and much worse than L2O"),
    "3e": ("3", "LGL2O goes over to the fallback"),
    "4a": ("4", "LGL2O is comparable to L2O early"),
    "4b": ("4", "L2O diverges later"),
    "4c": ("4", "GL2O is behind L2O early"),
    "4d": ("4", "LGL2O itself rises late, for the noise of ten check minibatches"),
    "5a": ("5", "SGDnm stays on a plateau forever"),
    "5b": ("5", "Adam stays there very long"),
    "5c": ("5", "LGL2O is as fast as L2O"),
    "5d": ("5", "after 50,000 steps LGL2O is better than both its parts"),
    "5e": ("section 4", "the loss of L2O rises considerably at first"),
    "6a": ("6", "L2O diverges very quickly"),
    "6b": ("6", "GL2O diverges too"),
    "6c": ("6", "LGL2O tracks its fallback"),
    "7a": ("7", "L2O diverges very quickly"),
    "7b": ("7", "GL2O diverges too"),
    "7c": ("7", "LGL2O tracks its fallback"),
    "8a": ("8", "L2O diverges very quickly"),
    "8b": ("8", "GL2O diverges too"),
    "8c": ("8", "LGL2O tracks its fallback"),
    "9": ("9", "Adam is the better fallback on Spirals"),
    "10": ("10", "a grid over rate and decay chose 0.01 and 50,000"),
    "11a": ("11", "meta-training on CIFAR-10 + ConvNet goes from exploding to stable losses"),
    "11b": ("11", "its L2O carries over to other data and to the test set"),
    "12a": ("12", "L2O is stable, LGL2O is better in the end"),
    "12b": ("12", "LGL2O rises late, for the noise of the check"),
    "13a": ("13", "until it rises LGL2O is better than both its parts"),
    "13b": ("13", "LGL2O rises late, for the noise of the check"),
    "14a": ("14", "SGDnm and GL2O get stuck, L2O and LGL2O do not"),
    "14b": ("14", "LGL2O is better than L2O and keeps converging"),
    "15": ("15", "L2O and LGL2O are faster than GL2O, all are faster than SGDnm"),
    "16": ("16", "LGL2O is better than L2O, GL2O and SGDnm, and keeps it"),
    "S3": ("section 3", "2 gradients a step and 2 nc / nt forward passes; GL2O 2 gradients"),
    "A": ("abstract", "LGL2O is stable for millions of steps"),
}
"""By its name: the figure, and what the paper says of it."""

_diverge = {f"{n}a": _on(f"fig{n:02}", _diverges("L2O")) for n in (6, 7, 8)}
_diverge |= {f"{n}b": _on(f"fig{n:02}", either(GL2O, _diverges)) for n in (6, 7, 8)}
_track = ratio_of("LGL2O", ["SGDnm"], _marks(100, K), up_to(1.05), beyond=True)
_stuck = [ratio_of(m, ["LGL2O"], [50_000], above(3)) for m in ("SGDnm", "GL2O")]
JUDGES: Mapping[str, Callable[[Evidence], Finding]] = {
    "2a": _converges,
    "2b": _on("fig02", _carries_over),
    "3a": _on("fig03", _fastest),
    "3b": _on("fig03", ratio_of("L2O", ["SGDnm"], [K], above(1), beyond=True)),
    "3c": _on("fig03", ratio_of("LGL2O", PARTS, _marks(30, K), up_to(1.1), beyond=True)),
    "3d": _on("fig03", either(GL2O, _early_price)),
    "3e": _on("fig03", _goes_over),
    "4a": _on("fig04", ratio_of("LGL2O", ["L2O"], _marks(100, 1_000), up_to(1.5))),
    "4b": _on("fig04", rises("L2O", K, expected=True)),
    "4c": _on("fig04", either(GL2O, lambda m: ratio_of(m, ["L2O"], _marks(100, 300), above(1)))),
    "4d": _on("fig04", _noise),
    "5a": _on("fig05", ratio_of("SGDnm", ["LGL2O"], [50_000], above(3))),
    "5b": _on("fig05", from_first("Adam 0.01", 1_000, above(0.5))),
    "5c": _on("fig05", ratio_of("LGL2O", ["L2O"], _marks(30, 30_000), up_to(1.5))),
    "5d": _on("fig05", ratio_of("LGL2O", PARTS, [K], below(0.9), beyond=True)),
    "5e": _on("fig05", _rises_at_first),
    **_diverge,
    **{f"{n}c": _on(f"fig{n:02}", _track) for n in (6, 7, 8)},
    "9": _on("fig09", _fallbacks),
    "10": _on("fig10", _grid),
    "11a": _explodes,
    "11b": _on_each(["fig13", "fig16"], _after_its_horizon),
    "12a": _on("fig12", _better_in_the_end),
    "12b": _on("fig12", _noise),
    "13a": _on("fig13", ratio_of("LGL2O", PARTS, _marks(1_000, 30_000), below(1))),
    "13b": _on("fig13", _noise),
    "14a": _on("fig14", each(*_stuck)),
    "14b": _on(
        "fig14",
        each(
            ratio_of("LGL2O", ["L2O"], _marks(10_000, K), below(1), beyond=True),
            rises("LGL2O", K, expected=False),
        ),
    ),
    "15": _on("fig15", either(GL2O, _faster)),
    "16": _on(
        "fig16",
        each(
            ratio_of("LGL2O", ["L2O", "GL2O", "SGDnm"], [K], below(1)),
            rises("LGL2O", K, expected=False),
        ),
    ),
    "S3": _counted,
    "A": _million,
}
CLAIMS: Sequence[Claim] = [Claim(id, *SAYS[id], JUDGES[id]) for id in SAYS]
