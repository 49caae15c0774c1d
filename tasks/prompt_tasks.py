"""The prompting tasks as data: the three diagnosis tasks of CINP and their phantom twins.

Cohorts and tasks are confirmed [paper]: ABIDE (autism), ADHD-200, SRPBS (several disorders). Class sizes, folds, atlas
and full tables are unknown; of the results only gains in accuracy are known, at second hand, so they are quoted as
sentences and never stand among the numbers.
"""

from __future__ import annotations

from typing import Any

from tasks.benchmarks import Benchmark, Metric

PAPER = "CINP, arXiv 2503.04205, MICCAI 2025"
METRICS: tuple[Metric, ...] = ("balanced_accuracy", "accuracy", "auroc", "f1", "sensitivity", "specificity")
"""The first decides: classes differ in size, and reviewers missed a balanced metric."""
CONTRADICTION = (
    "the gain of 29.33 % by prompting that the submission quotes contradicts its own table, says a reviewer of it "
    "(OpenReview, ICLR 2025): it is not used here"
)


def _gain(points: float, cohort: str) -> tuple[str, ...]:
    return (
        f"{PAPER} states a gain of {points:.2f} points of accuracy on {cohort} over the best model of structural MRI "
        "or of several modalities; the accuracy itself is not known here (third-party note, unverified)",
        CONTRADICTION,
    )


def _prompt(name: str, title: str, dataset: str, classes: tuple[str, ...], **more: Any) -> Benchmark:
    values = {
        "protocol": "prompt",
        "kind": "classification",
        "modalities": ("t1",),
        "target": "diagnosis",
        "metrics": METRICS,
        "basis": "unverified",
    }
    return Benchmark.model_validate(
        {**values, "name": name, "title": title, "datasets": (dataset,), "classes": classes, **more}
    )


_PHANTOM: dict[str, Any] = {"basis": "confirmed", "note": "phantoms with known answers, no patients"}
_CONTROL, _HYPO, _HYPER = "control", "hypoconnected", "hyperconnected"

_REGISTERED: tuple[Benchmark, ...] = (
    _prompt(
        "phantom-connect-diagnosis", "Phantom hypoconnected vs control", "phantom-connect", (_CONTROL, _HYPO),
        **_PHANTOM,
    ),
    _prompt(
        "phantom-connect-multiclass", "Phantom control, hypoconnected, hyperconnected", "phantom-connect",
        (_CONTROL, _HYPO, _HYPER), **_PHANTOM,
    ),
    _prompt(
        "phantom-connect-opposites", "Phantom hypoconnected vs hyperconnected (strong effect: positive control)",
        "phantom-connect", (_HYPO, _HYPER), **_PHANTOM, control="positive",
    ),
    _prompt(
        "phantom-connect-shuffled", "Phantom negative control (hypoconnected or control, shuffled)", "phantom-connect",
        (_CONTROL, _HYPO), **_PHANTOM, shuffle_seed=20250306, control="negative",
    ),
    _prompt(
        "cinp-abide", "ABIDE I autism vs HC", "abide-i", ("HC", "autism"), claims=_gain(1.46, "ABIDE"),
        note="the paper's cohort is ABIDE; which release, and how many subjects of it, is unknown",
    ),
    _prompt(
        "cinp-adhd200", "ADHD-200 ADHD vs HC", "adhd-200", ("HC", "ADHD"), claims=_gain(1.26, "ADHD-200"),
        note="how many subjects the paper took is unknown",
    ),
    _prompt(
        "cinp-srpbs", "SRPBS autism, depression, schizophrenia, HC", "srpbs", ("HC", "ASD", "MDD", "SCZ"),
        claims=_gain(1.21, "SRPBS"),
        note="that the paper tells several disorders apart is confirmed, which ones is not: these classes are a guess, "
        "all others are left out",
    ),
)  # fmt: skip

PROMPT_TASKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _REGISTERED}
"""Every registered prompting task by name, whether or not its data are at hand."""

PHANTOM_PROMPTS: tuple[str, ...] = tuple(name for name in PROMPT_TASKS if name.startswith("phantom-"))


def find_prompt_task(name: str) -> Benchmark:
    """Return a registered prompting task; raises KeyError listing the known names."""
    try:
        return PROMPT_TASKS[name]
    except KeyError:
        raise KeyError(f"unknown prompting task {name!r}; known: {', '.join(PROMPT_TASKS)}") from None
