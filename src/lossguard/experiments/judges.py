"""What judges single claims of the paper: formulas that no other claim needs.

Letters: k an optimizer step, K the step at which an end is judged.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import polars as pl

from ..curves import divided
from .evidence import MARKS, Evidence, Figure, NotRunError
from .formulas import (
    Finding,
    Formula,
    all_of,
    at_marks,
    each,
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


def on(number: int, formula: Formula) -> Callable[[Evidence], Finding]:
    """A formula on the curves of a figure."""
    return lambda evidence: formula(evidence.figure(f"fig{number:02}"))


def on_each(numbers: Sequence[int], formula: Formula) -> Callable[[Evidence], Finding]:
    """On each of several figures."""

    def judge(evidence: Evidence) -> Finding:
        several = {n: found(lambda n=n: on(n, formula)(evidence)) for n in numbers}
        told = (one._replace(numbers=f"fig{n:02}: {one.numbers}") for n, one in several.items())
        return all_of(told)

    return judge


def marks(first: int, last: int) -> list[int]:
    return [k for k in MARKS if first <= k <= last]


def converges(evidence: Evidence) -> Finding:
    """2a, on validation losses."""
    curves = evidence.meta_training("lstm-mnist-mlp")
    steps, losses = curves["meta_step"].to_numpy(), curves["validation"].to_numpy().mean(axis=1)
    tenth = losses[steps > 0.9 * steps[-1]]
    ratio, spread = tenth.mean() / losses[0], (tenth.max() - tenth.min()) / tenth.mean()
    numbers = f"last tenth of {steps[-1]:,} meta-steps over the first: {short(ratio)}"
    return Finding(bool(ratio < 0.5 and spread < 0.1), f"{numbers}, spread {spread:.0%}")


def carries_over(figure: Figure) -> Finding:
    """2b; a method is a data set here."""
    names = ("fashion_mnist", "moons", "circles", "spirals", "cifar10")
    ratios = {name: figure.over_first(name, 100) for name in names}
    known = max(ratios[name][0] for name in names[:3])
    other = min(ratios[name][0] for name in names[3:])
    numbers = ", ".join(f"{name} {short(ratio)}" for name, (ratio, _) in ratios.items())
    seeds = min(seeds for _, seeds in ratios.values())
    passes = known < other and known < 0.8
    return Finding(passes, f"at 100 over the first loss: {numbers}", {100: seeds})


def fastest(figure: Figure) -> Finding:
    """3a, of all but LGL2O, which has L2O as a part."""
    others = ["SGDnm", "Adam", *(m for m in GL2O[1:] if figure.has(m)), "GL2O"]
    finding = ratio_of("L2O", others, (30, 100, 300), "<", 1)(figure)
    alone = ["L2O", "SGDnm", "Adam"]
    steps = range(30, min(figure.last(*alone), 10_000) + 1, 10)
    ahead = [k for k in steps if over(*alone)(figure.losses(alone, k).of) < 1]
    led = f"; ahead of SGDnm and Adam at {max(ahead):,} for the last time" if ahead else ""
    return finding._replace(numbers=finding.numbers + led)


def early_price(name: str) -> Formula:
    """3d, by one reading of GL2O."""
    return each(ratio_of("L2O", [name], [100], "<", 0.7), ratio_of(name, ["SGDnm"], [100], "<", 1))


def goes_over(figure: Figure) -> Finding:
    """3e."""
    share, seeds = figure.share("LGL2O", 0.9 * K, K)
    numbers = f"share of learned steps from {int(0.9 * K):,} to {K:,}: {share:.2g}"
    return Finding(share < 0.1, numbers, {K: seeds})


def noise(figure: Figure) -> Finding:
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


def rises_at_first(figure: Figure) -> Finding:
    """5e."""
    _, seeds = figure.over_first("L2O", 50)
    early = figure.curves.filter(pl.col("method") == "L2O", pl.col("step") <= 50)
    losses = early.group_by("step").agg(pl.col("loss").mean()).sort("step")["loss"].to_numpy()
    ratio = float(losses.max() / losses[0])
    numbers = f"the highest loss of 50 steps over the first: {short(ratio)}"
    return Finding(ratio > 1.5, numbers, {50: seeds})


def diverges(method: str) -> Formula:
    """6a to 8b."""
    return from_first(method, 1_000, 1, or_rises=True)


def grid(figure: Figure) -> Finding:
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


def explodes(evidence: Evidence) -> Finding:
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


def after_its_horizon(figure: Figure) -> Finding:
    """11b, on one data set."""
    ratio, seeds = figure.over_first("L2O", HORIZON)
    step, tested = figure.tested("L2O", HORIZON)
    on_test = divided(tested, figure.losses(["L2O"], 1, seeds_at=HORIZON).of["L2O"])
    numbers = f"L2O over its first loss: {short(ratio)} at {HORIZON}, on the test set "
    return Finding(
        max(ratio, on_test) < 1, numbers + f"{short(on_test)} at {step:,}", {HORIZON: seeds}
    )


def better_in_the_end(figure: Figure) -> Finding:
    """12a."""
    both = ("LGL2O", "L2O")
    losses = [figure.losses(both, k, seeds_at=K) for k in marks(30, K)]
    ours, theirs = (min(one.of[m] for one in losses) for m in both)
    ratio = divided(ours, theirs)
    numbers = f"least of LGL2O over least of L2O: {short(ratio)}"
    return Finding(ratio < 1, numbers, {K: losses[-1].seeds})


def faster(name: str) -> Formula:
    """15, by one reading of GL2O."""

    def worst(of: Mapping[str, float]) -> float:
        return max(*(divided(of[m], of[name]) for m in ("L2O", "LGL2O")), over(name, "SGDnm")(of))

    what = f"the worst of L2O and LGL2O over {name} and {name} over SGDnm"
    return at_marks(what, worst, ["L2O", "LGL2O", name, "SGDnm"], marks(30, 3_000), "<", 1)


def counted(evidence: Evidence) -> Finding:
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


def million(evidence: Evidence) -> Finding:
    """A."""
    steady = (rises(method, 1_000_000, expected=False) for method in ("LGL2O", NC_100))
    return all_of(on_each([3, 4, 5], formula)(evidence) for formula in steady)
