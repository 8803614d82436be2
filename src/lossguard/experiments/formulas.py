"""The paper's claims as formulas over losses, one function each; ``claims.py`` says them in words.

Letters: m a method, k an optimizer step, K the last one of a run. ``ratio <= bound`` stands for
``a <= bound b``, so that what is not finite compares in one way, that of ``findings.divided``.
"""

import math
from collections.abc import Sequence

import numpy as np
import polars as pl

from .evidence import Evidence, Run, marks
from .findings import (
    OVER,
    Finding,
    all_of,
    as_good_as_its_parts,
    at,
    at_end,
    at_marks,
    diverges,
    divided,
    every_mark,
    over_least,
    over_parts,
    tracks,
)


def works_where_the_mlp_suffices(runs: Sequence[Run]) -> Finding:
    """C2, on the runs of figure 2 in the order of ``recipes.FIRST``."""
    found = all_of(*map(_first_steps, runs))
    return Finding(found.holds, f"Loss(L2O, 100) over the initial loss: {found.measured}")


def _first_steps(run: Run) -> Finding:
    dataset = run.recipe.dataset
    if run.last < 100:
        return Finding(None, f"{dataset} was not run to step 100")
    initial = run.losses(1)["L2O"]
    share = divided(run.losses(100)["L2O"], initial) if math.isfinite(initial) else math.inf
    works = share < 0.6
    expected = dataset not in ("spirals", "cifar10")
    return Finding(works == expected, f"{dataset} {share:.2g}")


def fastest_at_first(run: Run) -> Finding:
    """C3a."""
    return all_of(
        *(
            at(run, k, lambda m: m["L2O"] < min(m["SGDnm"], m["Adam"]), ("L2O", "SGDnm", "Adam"))
            for k in (100, 300)
        )
    )


def stops_improving(run: Run) -> Finding:
    """C3b."""
    return at_end(run, lambda m: m["L2O"] > m["SGDnm"], ("L2O", "SGDnm"))


def always_as_good(run: Run) -> Finding:
    """C3c."""
    return as_good_as_its_parts(run, every_mark(run))


def safety_costs_early(run: Run) -> Finding:
    """C3d."""
    return at(run, 100, lambda m: m["L2O"] < m["GL2O"] < m["SGDnm"], ("L2O", "GL2O", "SGDnm"))


def no_early_divergence(run: Run) -> Finding:
    """C4."""
    return all_of(
        as_good_as_its_parts(run, marks(10_000)),
        at(run, 300, lambda m: m["LGL2O"] < m["GL2O"], ("LGL2O", "GL2O")),
    )


def stays_on_the_plateau(run: Run) -> Finding:
    """C5a."""
    return at_end(run, lambda m: m["SGDnm"] > 3 * m["LGL2O"], ("SGDnm", "LGL2O"))


def better_than_both(run: Run) -> Finding:
    """C5b."""
    late = [k for k in every_mark(run) if k > 50_000]
    return at_marks(run, late, lambda k: over_parts(run.losses(k)), lambda r: r < 0.9, OVER)


def others_diverge(run: Run) -> Finding:
    """C6 and C7."""
    return all_of(diverges(run, "L2O"), diverges(run, "GL2O"), tracks(run, "LGL2O", "SGDnm"))


def others_diverge_to_nan(run: Run) -> Finding:
    """C8."""
    return all_of(
        diverges(run, "L2O"),
        at_end(run, lambda m: math.isinf(m["GL2O"]), ("GL2O",)),
        tracks(run, "LGL2O", "SGDnm"),
    )


def first_is_better(run: Run, first: str, second: str) -> Finding:
    """C9."""
    return at_end(run, lambda m: m[first] < m[second], run.config["methods"])


def clear_best(run: Run) -> Finding:
    """C10: no other setting is within 5 % of the best, that is, tracks it."""
    if run.last < run.full_length:
        told = f"step {run.full_length:,} was not reached, the last one is {run.last:,}"
        return Finding(None, told)
    losses = run.losses(run.last)
    best, *others = sorted(losses, key=lambda m: losses[m])
    near = [m for m in others if losses[m] <= 1.05 * losses[best]]
    named = ", ".join(near) or "none"
    others_near = f"within 5 % of it: {named if len(near) < 4 else f'{len(near)} others'}"
    return Finding(
        math.isfinite(losses[best]) and not near,
        f"best of {len(losses)} is {best} with {losses[best]:.3g} at step {run.last:,}; "
        f"{others_near}",
    )


def can_be_meta_trained(curves: pl.DataFrame) -> Finding:
    """C11: the optimizee's initial loss is that of validation before its first step."""
    initial = float(curves["validation"].to_numpy()[0][0])
    losses, steps = curves["meta_loss"].to_numpy(), curves["meta_step"].to_numpy()
    tenth = losses[steps > 0.9 * steps[-1]]
    least = np.min(losses, where=np.isfinite(losses), initial=math.inf)
    holds = bool(least < initial and np.isfinite(tenth).all())
    return Finding(
        holds,
        f"the meta-loss starts at {losses[0]:.3g}, is {least:.3g} at least and "
        f"{tenth.mean():.3g} over the last tenth of {steps[-1]:,} meta-steps; initially an "
        f"optimizee has {initial:.3g}",
    )


def as_good_until_nc_is_too_few(run: Run) -> Finding:
    """C12: nc is too few from the first mark on at which LGL2O has twice its least loss so far."""
    _, *later = marks(run.last) or [100]
    late = next((k for k in later if over_least(run, "LGL2O", k) > 2), None)
    if late is None:
        return always_as_good(run)
    found = as_good_as_its_parts(run, [k for k in marks(run.last) if k < late])
    return Finding(found.holds, f"{found.measured}; LGL2O diverges from step {late:,} on")


def costs(run: Run) -> Finding:
    """C13."""
    k, per_cycle = run.last, run.recipe.nc / run.recipe.nt
    last = run.curves.filter(pl.col("step") == k).group_by("method").agg(pl.all().max())
    spent = last.rows_by_key("method", named=True, unique=True)
    ours, theirs = spent["LGL2O"], spent["GL2O"]
    seconds = {m: run.manifest["seconds"][m] / k / run.config["seeds"] for m in spent}
    return Finding(
        math.isclose(ours["gradients"], 2 * k)
        and math.isclose(ours["forwards"], 2 * per_cycle * k)
        and math.isclose(theirs["gradients"], 2 * k)
        and theirs["forwards"] == 0,
        f"a step of {run.config['name']}: LGL2O {ours['gradients'] / k:.3g} gradients, "
        f"{ours['forwards'] / k:.3g} forward passes and {1e6 * seconds['LGL2O']:.0f} us, "
        f"GL2O {theirs['gradients'] / k:.3g}, {theirs['forwards'] / k:.3g} and "
        f"{1e6 * seconds['GL2O']:.0f} us",
    )


def stable_for_a_million_steps(evidence: Evidence) -> Finding:
    """C15, on every run that long, whatever its seeds."""
    long = [r for r in evidence.runs if r.has("LGL2O", "L2O") and r.last >= 1_000_000]
    if not long:
        return Finding(None, "no run with LGL2O and L2O has 1,000,000 steps")
    return all_of(*map(_stable, long))


def _stable(run: Run) -> Finding:
    all_marks = marks(run.last)
    found = at_marks(
        run,
        all_marks,
        lambda k: over_least(run, "LGL2O", k),
        lambda rise: rise <= 2,
        f"in {run.folder.name} LGL2O over its least so far",
    )
    theirs = max(over_least(run, "L2O", k) for k in all_marks)
    return Finding(found.holds, f"{found.measured}, L2O over its own {theirs:.3g}")
