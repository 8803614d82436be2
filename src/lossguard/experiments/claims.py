"""The paper's claims, judged by records.

Loss(m, k) is the mean over seeds of method m's training loss, averaged over the steps in
[0.9 k, k]; K is the last step; marks are k in {100, 300, 1000, 3000, ...} up to K. A method tracks
another within 5 %, and diverges if Loss(m, K) > 2 min_k Loss(m, k) or it is not finite.

What is not finite is worse than anything, its like included. A claim about every mark fails with
the first mark that does, and holds only if the run is as long as its recipe, the paper's length; a
claim about K is not run before. A run speaks for a recipe if its settings are the recipe's but for
length, seeds and methods, and its seeds start at 0; ``Evidence.run`` says which one of several.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from ..progress import Progress
from ..records import Record
from . import formulas, theorems
from .evidence import Evidence, Run, gather
from .findings import Finding, all_of
from .recipes import PAPERS, SETS

Outcome = Literal["holds", "fails", "not run"]


class Verdict(NamedTuple):
    """What the records say of a claim."""

    id: str
    """As in C3a."""
    figure: str
    """The paper's, or where else it says so."""
    claim: str
    formula: str
    outcome: Outcome
    measured: str
    """A sentence with the numbers."""
    folder: Path | None
    """Of the run that says so, if it is one."""


def judge_claims(records: Mapping[Path, Record]) -> list[Verdict]:
    """Every claim once, in the paper's order, judged by the records of these folders.

    Those of other experiments are passed over.
    """
    evidence, verdicts, slow = gather(records), [], "C14 is computed, not read"
    with Progress("judging", total=len(CLAIMS), unit="claims", first=slow) as progress:
        for claim in CLAIMS:
            verdicts.append(_judge(claim, evidence))
            progress.advance(1)
    return verdicts


def judge_run(folder: Path, record: Record) -> list[Verdict]:
    """The claims that one run has something to say about, judged by its record alone."""
    evidence, nothing = gather({folder: record}), gather({})
    about_runs = [claim for claim in CLAIMS if claim.judge is not _c14]
    unasked = [_judge(claim, nothing) for claim in about_runs]
    asked = [_judge(claim, evidence) for claim in about_runs]
    return [verdict for verdict in asked if verdict not in unasked]


def _judge(claim: "Claim", evidence: Evidence) -> Verdict:
    holds, measured, folder = claim.judge(evidence)
    return Verdict(*claim[:4], OUTCOMES[holds], measured, folder)


OUTCOMES: dict[bool | None, Outcome] = {True: "holds", False: "fails", None: "not run"}

Judge = Callable[[Evidence], Finding]


class Claim(NamedTuple):
    """What the paper claims, and what judges it."""

    id: str
    figure: str
    says: str
    formula: str
    judge: Judge


def _on(recipe: str, methods: Sequence[str], formula: Callable[[Run], Finding]) -> Judge:
    """A formula on the run that speaks for a recipe and has these methods."""

    def judge(evidence: Evidence) -> Finding:
        run = evidence.run(recipe, *methods)
        if run is None:
            return Finding(None, f"no run of {recipe} has its settings and the methods compared")
        return formula(run)._replace(folder=run.folder)

    return judge


def _c2(evidence: Evidence) -> Finding:
    runs = {name: evidence.run(name, "L2O") for name in SETS["fig02"]}
    missing = [name for name, run in runs.items() if run is None]
    if missing:
        return Finding(None, f"no run of {', '.join(missing)} has its settings and L2O")
    return formulas.works_where_the_mlp_suffices([run for run in runs.values() if run])


def _c9(evidence: Evidence) -> Finding:
    """At the rate that Adam has alone, in figure 5."""
    e = PAPERS["fig09"]()
    methods = (f"LGL2O over Adam {e.adam_rate:g}", f"LGL2O over SGDnm {e.sgd_rate:g}")

    def formula(run: Run) -> Finding:
        return formulas.first_is_better(run, *methods)

    return _on("fig09", methods, formula)(evidence)


def _c10(evidence: Evidence) -> Finding:
    """On the whole grid."""
    return _on("fig10", PAPERS["fig10"]().methods, formulas.clear_best)(evidence)


def _c11(evidence: Evidence) -> Finding:
    curves = evidence.meta.get("lstm-cifar10-conv")
    if curves is None:
        return Finding(None, "no meta-training of lstm-cifar10-conv")
    return formulas.can_be_meta_trained(curves)


def _c13(evidence: Evidence) -> Finding:
    """On the first figure that has been run."""
    for name in SETS["table1"]:
        run = evidence.run(name, "LGL2O", "GL2O")
        if run is not None:
            return formulas.costs(run)._replace(folder=run.folder)
    return Finding(None, "no run of table 1 with LGL2O and GL2O")


def _c14(evidence: Evidence) -> Finding:
    return all_of(theorems.theorem_5(), theorems.theorem_7())


PARTS = ("LGL2O", "L2O", "SGDnm")
WITH_OTHER = "with the other learned optimizer LGL2O is as good as or better than its parts on "
UNTIL = "C3c up to the step from which nc = 10 is too few: Loss(LGL2O) > 2 min so far"
TRACKS = "L2O and GL2O diverge, LGL2O tracks SGDnm"

CLAIMS: Sequence[Claim] = (
    Claim(
        "C2",
        "2",
        "an L2O meta-trained on MNIST + MLP works on Fashion-MNIST, Moons and Circles; Spirals and "
        "CIFAR-10 exceed the small MLP",
        "Loss(L2O, 100) < 0.6 of the initial loss on the first four, not on Spirals and CIFAR-10",
        _c2,
    ),
    Claim(
        "C3a",
        "3",
        "in distribution L2O is the fastest at first",
        "Loss(L2O, k) < Loss(SGDnm, k) and < Loss(Adam, k) at k = 100, 300",
        _on("fig03", ("L2O", "SGDnm", "Adam"), formulas.fastest_at_first),
    ),
    Claim(
        "C3b",
        "3",
        "L2O stops improving or diverges after about 1,000 steps",
        "Loss(L2O, K) > Loss(SGDnm, K)",
        _on("fig03", ("L2O", "SGDnm"), formulas.stops_improving),
    ),
    Claim(
        "C3c",
        "3",
        "LGL2O is as good as the better of its parts, always",
        "Loss(LGL2O, k) <= 1.1 min(Loss(L2O, k), Loss(SGDnm, k)) at every mark",
        _on("fig03", PARTS, formulas.always_as_good),
    ),
    Claim(
        "C3d",
        "3",
        "GL2O pays for safety early",
        "Loss(L2O, 100) < Loss(GL2O, 100) < Loss(SGDnm, 100)",
        _on("fig03", ("L2O", "GL2O", "SGDnm"), formulas.safety_costs_early),
    ),
    Claim(
        "C4",
        "4",
        "Circles: LGL2O with L2O early, no early divergence; GL2O slower early",
        "C3c up to 10,000 steps; Loss(LGL2O, 300) < Loss(GL2O, 300)",
        _on("fig04", (*PARTS, "GL2O"), formulas.no_early_divergence),
    ),
    Claim(
        "C5a",
        "5",
        "Spirals: SGDnm stays on the plateau",
        "Loss(SGDnm, K) > 3 Loss(LGL2O, K)",
        _on("fig05", ("SGDnm", "LGL2O"), formulas.stays_on_the_plateau),
    ),
    Claim(
        "C5b",
        "5",
        "after 50,000 steps LGL2O is better than both of its parts",
        "Loss(LGL2O, k) < 0.9 min(Loss(L2O, k), Loss(SGDnm, k)) at marks k > 50,000",
        _on("fig05", PARTS, formulas.better_than_both),
    ),
    Claim(
        "C6",
        "6",
        "MNIST + ConvNet-3: L2O and GL2O diverge, LGL2O tracks SGDnm",
        TRACKS,
        _on("fig06", (*PARTS, "GL2O"), formulas.others_diverge),
    ),
    Claim(
        "C7",
        "7",
        "CIFAR-10 + ConvNet-3: L2O and GL2O diverge, LGL2O tracks SGDnm",
        TRACKS,
        _on("fig07", (*PARTS, "GL2O"), formulas.others_diverge),
    ),
    Claim(
        "C8",
        "8",
        "TinyImagenet50 + ConvNet-5: L2O diverges, GL2O to NaN, LGL2O tracks SGDnm",
        "L2O diverges, Loss(GL2O, K) is not finite, LGL2O tracks SGDnm",
        _on("fig08", (*PARTS, "GL2O"), formulas.others_diverge_to_nan),
    ),
    Claim(
        "C9",
        "9",
        "Spirals: with Adam as its fallback LGL2O is better than with SGDnm",
        "Loss(LGL2O over Adam, K) < Loss(LGL2O over SGDnm, K)",
        _c9,
    ),
    Claim(
        "C10",
        "10",
        "the grid over rate and decay for ConvNets has a clear best",
        "no other setting is within 5 % of the best at K",
        _c10,
    ),
    Claim(
        "C11",
        "11",
        "an L2O can be meta-trained on CIFAR-10 + ConvNet-3: from exploding losses to stable ones",
        "the meta-loss falls below the optimizee's initial loss and is finite over the last tenth",
        _c11,
    ),
    *(
        Claim(
            f"C12{letter}",
            figure,
            WITH_OTHER + task,
            UNTIL,
            _on(f"fig{figure}", PARTS, formulas.as_good_until_nc_is_too_few),
        )
        for letter, figure, task in (
            ("a", "12", "MNIST + MLP"),
            ("b", "13", "MNIST + ConvNet-3"),
            ("c", "14", "Spirals + MLP"),
            ("d", "15", "Circles + MLP"),
            ("e", "16", "CIFAR-10 + ConvNet-3"),
        )
    ),
    Claim(
        "C13",
        "section 3",
        "LGL2O needs 2 gradients a step, side by side, and 2 nc / nt forward passes; GL2O needs 2 "
        "gradients in sequence",
        "counted in the decisions; seconds a step in the same run",
        _c13,
    ),
    Claim(
        "C14",
        "theorems 5, 7",
        "with any L2O LGL2O converges on strongly convex problems, at the fallback's rate or "
        "better",
        "E_k <= (1 - (2 mu a/L)(1 - a/2))^k E_0 for gradient descent with step a/L; "
        "E[E_k] <= C/(k + k0) for SGD with a rate ~ 1/(k0 + k)",
        _c14,
    ),
    Claim(
        "C15",
        "abstract",
        "LGL2O stays stable for a million steps and more, where L2O can't",
        "no mark with Loss(LGL2O) > 2 min so far, K >= 1,000,000",
        formulas.stable_for_a_million_steps,
    ),
)
