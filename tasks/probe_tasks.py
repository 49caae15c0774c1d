"""The linear probes as data: AnatCL's diagnosis tasks and clinical scores, BrainMVP's classifications, phantom twins.

Which tasks the paper ran is known in part (methods: confirmed [paper] schizophrenia, Asperger, PDD-NOS, AD on OASIS-3,
age on OpenBHB); every other one, and all clinical scores, are `unverified`. Class sizes and the values of single tasks
are unknown, so only the age has published rows.
"""

from __future__ import annotations

from typing import Any

from tasks.benchmarks import BENCHMARKS, Benchmark, Published, SplitProtocol

PAPER = "AnatCL, arXiv 2408.07079, Pattern Recognition Letters 199 (2026)"
FOLDS = "the paper's protocol is a linear probe in five folds, by balanced accuracy (age: MAE)"
HALVES = ("lower half", "upper half")


def _probe(name: str, title: str, dataset: str, classes: tuple[str, ...] = (), **more: Any) -> Benchmark:
    kind = "classification" if classes else "regression"
    values = {
        "protocol": "probe",
        "kind": kind,
        "modalities": ("gm",),
        "target": "diagnosis" if classes else "age",
        "metrics": ("balanced_accuracy", "auroc") if classes else ("mae", "r"),
        "basis": "unverified",
        "note": FOLDS,
    }
    return Benchmark.model_validate(
        {**values, "name": name, "title": title, "datasets": (dataset,), "classes": classes, **more}
    )


def _age(method: str, value: float, source: str, basis: str) -> Published:
    return Published.model_validate(
        {"method": method, "metric": "mae", "value": value, "source": source, "basis": basis}
    )


def _score(name: str, title: str, target: str, classes: tuple[str, ...] = HALVES, **more: Any) -> Benchmark:
    """Return a clinical score of SchizConnect: without cuts and words of its own it is halved at its median."""
    own: dict[str, Any] = {} if more or classes != HALVES else {"quantiles": True}
    values = {"target": target, "note": f"{FOLDS}; which score, and how it was made discrete, is unknown", **own}
    return _probe(f"schizconnect-{name}", f"SchizConnect {title}", "schizconnect", classes, **{**values, **more})


_PHANTOM: dict[str, Any] = {
    "basis": "confirmed",
    "note": "phantoms with known answers, no patients",
}
_HC = "HC"
_AD_LIKE = ("control", "ad-like")

_REGISTERED: tuple[Benchmark, ...] = (
    _probe("phantom-anat-age", "Phantom age", "phantom-anat", **_PHANTOM),
    _probe("phantom-anat-sex", "Phantom sex", "phantom-anat", ("M", "F"), target="sex", **_PHANTOM),
    _probe(
        "phantom-anat-schizophrenia", "Phantom schizophrenia-like vs control", "phantom-anat",
        ("control", "schizophrenia-like"), **_PHANTOM,
    ),
    _probe(
        "phantom-anat-ad", "Phantom AD-like vs control (strong effect: positive control)", "phantom-anat",
        _AD_LIKE, **_PHANTOM, control="positive",
    ),
    _probe(
        "phantom-anat-shuffled", "Phantom negative control (AD-like or control, shuffled)", "phantom-anat",
        _AD_LIKE, **_PHANTOM, shuffle_seed=20240808, control="negative",
    ),
    _probe(
        "openbhb-age", "OpenBHB age", "openbhb", basis="confirmed",
        published=(
            _age("AnatCL", 2.55, "the authors' page (conflicts with 2.61)", "inferred"),
            _age("AnatCL", 2.61, "note on an arXiv version (conflicts with 2.55)", "inferred"),
        ),
    ),
    _probe("openbhb-sex", "OpenBHB sex", "openbhb", ("M", "F"), target="sex"),
    _probe("adni-mci", "ADNI MCI vs HC", "adni", (_HC, "MCI")),
    _probe("adni-ad", "ADNI AD vs HC", "adni", (_HC, "AD")),
    _probe(
        "adni-smci-pmci", "ADNI progressive vs stable MCI", "adni", ("sMCI", "pMCI"), target="mci_course",
        note=f"{FOLDS}; doubtful whether it is among the paper's twelve tasks",
    ),
    _probe("oasis3-ad", "OASIS-3 AD vs HC", "oasis3", (_HC, "AD"), basis="confirmed"),
    _probe(
        "schizconnect-broad", "SchizConnect schizophrenia (broad) vs HC", "schizconnect",
        (_HC, "schizophrenia broad"), basis="confirmed",
    ),
    _probe(
        "schizconnect-strict", "SchizConnect schizophrenia (strict) vs HC", "schizconnect",
        (_HC, "schizophrenia strict"), basis="confirmed",
    ),
    _probe("schizconnect-bipolar", "SchizConnect bipolar disorder vs HC", "schizconnect", (_HC, "bipolar")),
    _probe(
        "schizconnect-schizoaffective", "SchizConnect schizoaffective disorder vs HC", "schizconnect",
        (_HC, "schizoaffective"),
    ),
    _probe("abide-autism", "ABIDE I autism vs HC", "abide-i", (_HC, "autism"), target="dsm_iv"),
    _probe(
        "abide-asperger", "ABIDE I Asperger vs HC", "abide-i", (_HC, "Asperger"), target="dsm_iv", basis="confirmed"
    ),
    _probe("abide-pdd-nos", "ABIDE I PDD-NOS vs HC", "abide-i", (_HC, "PDD-NOS"), target="dsm_iv", basis="confirmed"),
    *(
        _score(f"aims-{part}", f"AIMS, {part} movements", f"aims_{part}", ("none", "any"), cuts=(0.0,))
        for part in ("overall", "upper", "lower")
    ),
    _score("calgary", "Calgary depression scale", "calgary_depression", ("up to 6", "above 6"), cuts=(6.0,)),
    _score("handedness", "handedness", "handedness", ("left", "right")),
    _score("saps", "SAPS (positive symptoms)", "saps"),
    _score("vocabulary", "IQ vocabulary", "iq_vocabulary"),
    _score("matrix-reasoning", "IQ matrix reasoning", "iq_matrix_reasoning"),
    _score("memory", "memory", "memory"),
    _score("attention", "attention", "attention"),
)  # fmt: skip

FROZEN = "-probe"
"""End of the name under which a benchmark of fine-tuning is probed."""


def _frozen(benchmark: Benchmark) -> Benchmark:
    """Return the probe of a classification that is registered for fine-tuning, of which its published numbers are."""
    note = f"{benchmark.note}; frozen encoders on cohort and classes of {benchmark.name!r}"
    return benchmark.replace(
        name=f"{benchmark.name}{FROZEN}", title=f"{benchmark.title}, frozen", protocol="probe", published=(),
        metrics=("auroc", "balanced_accuracy", "accuracy", "f1"), split=SplitProtocol(), test_subjects=None,
        note=f"{note}; published numbers are of fine-tuning and stand in its table",
    )  # fmt: skip


TWINS: tuple[Benchmark, ...] = tuple(_frozen(one) for one in BENCHMARKS.values() if one.kind == "classification")
"""The classifications of fine-tuning as probes of frozen encoders."""

PROBES: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in (*_REGISTERED, *TWINS)}
"""Every registered probe by name, whether or not its data are at hand."""

PHANTOM_PROBES: tuple[str, ...] = tuple(one.name for one in _REGISTERED if one.name.startswith("phantom-"))


def find_probe(name: str) -> Benchmark:
    """Return a registered probe; raises KeyError listing the known names, and the probe of a benchmark's name."""
    try:
        return PROBES[name]
    except KeyError:
        twin = f"; {name!r} is fine-tuned, its probe is {name + FROZEN!r}" if name + FROZEN in PROBES else ""
        raise KeyError(f"unknown probe {name!r}{twin}; known: {', '.join(PROBES)}") from None


def site_probe(datasets: tuple[str, ...], modalities: tuple[str, ...], sites: tuple[str, ...]) -> Benchmark:
    """Return the report of the site effect: how well features tell where a case was scanned."""
    return _probe(
        "site", "Site effect", datasets[0], sites, datasets=datasets, modalities=modalities, target="site",
        metrics=("balanced_accuracy",), basis="confirmed",
        note=f"how well frozen features tell the {len(sites)} sites apart: lower is better, chance is "
        f"{1 / len(sites):.3f}",
    )  # fmt: skip
