"""The benchmarks as data: dataset, labels, split protocol, metrics and what was published about each.

`basis` says how sure a published number is: `confirmed` (one source, or several that agree), `inferred` (sources
conflict, or the number was deduced) and `unverified` (second hand, nobody here has checked it). It is shown in every
table. A benchmark whose data are not in the store is shown as `no data`, never with a number of ours.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from models.config import Region
from models.records import Record
from tasks.label_schemes import find_scheme

Basis = Literal["confirmed", "inferred", "unverified"]
Metric = Literal[
    "dice", "hd95", "hd95_pooled", "nsd", "volume_error_ml", "volume_error",
    "lesion_dice", "lesion_f1", "lesion_sensitivity", "false_lesions",
    "accuracy", "balanced_accuracy", "auroc", "f1", "auprc", "sensitivity", "specificity", "brier", "ece",
    "mae", "r",
]  # fmt: skip
"""What each of them is: docs/metrics.md."""

SEGMENTATION_METRICS: tuple[Metric, ...] = ("dice", "hd95", "hd95_pooled", "nsd", "volume_error_ml", "volume_error")
LESION_METRICS: tuple[Metric, ...] = ("lesion_dice", "lesion_f1", "lesion_sensitivity", "false_lesions")
CLASSIFICATION_METRICS: tuple[Metric, ...] = (
    "accuracy", "balanced_accuracy", "auroc", "f1", "auprc", "sensitivity", "specificity", "brier", "ece",
)  # fmt: skip
REGRESSION_METRICS: tuple[Metric, ...] = ("mae", "r")
METRICS = {
    "segmentation": (*SEGMENTATION_METRICS, *LESION_METRICS),
    "classification": CLASSIFICATION_METRICS,
    "regression": REGRESSION_METRICS,
}


class Published(Record):
    """One published number: never computed by us, always shown as published."""

    method: str
    metric: Metric
    value: float
    """Share (0..1) for Dice, accuracy, AUROC and F1; millimetres for HD95; years for the error of an age."""
    region: str = ""
    """Region name; `mean` over regions for a mean Dice; empty for classification."""
    source: str
    basis: Basis


class LesionRule(Record):
    """What counts as one lesion, and which of them count; see tasks.metrics_lesions."""

    dilation: int = Field(0, ge=0)
    """Steps of one voxel by which true lesions are dilated: those that then touch are one, and a predicted lesion
    belongs to those that it then meets."""
    min_volume_mm3: float = Field(0.0, ge=0)
    """True lesions of at most this volume do not count."""


class SplitProtocol(Record):
    """How subjects are divided: by subject, stratified and seeded, in the one split that covers a workspace, so that a
    test subject never enters a pre-training either (tasks.split_protocol)."""

    shares: tuple[float, float, float] = (0.7, 0.1, 0.2)
    """Of train, val and test; a split that asks for other shares than these has them for every dataset."""
    stratify: tuple[str, ...] = ("diagnosis", "site")
    """Columns that the split is stratified by where the data are there, beside tasks.splits.STRATIFY."""
    note: str = ""


class Benchmark(Record):
    """One downstream task."""

    name: str
    title: str
    kind: Literal["segmentation", "classification", "regression"]
    protocol: Literal["fine-tune", "probe", "prompt"] = Field(
        "fine-tune", exclude_if=lambda value: value == "fine-tune"
    )
    """`fine-tune`: on the train role, scored on the test role. `probe`: linear, of a frozen encoder, cross-validated.
    `prompt`: images by labelled connectomes (tasks.prompting), cross-validated.
    The value that all benchmarks had before there were probes is left out of digests."""
    datasets: tuple[str, ...] = Field(min_length=1)
    """Datasets of the store whose cases belong to it."""
    modalities: tuple[str, ...] = Field(min_length=1)
    """Input channels in order; a case needs at least one of them, absent ones are read as zeros."""
    scheme: str = ""
    """Label scheme of a segmentation."""
    other_schemes: tuple[str, ...] = Field((), exclude_if=lambda value: not value)
    """Schemes of other releases of the same cases: the regions are those of the scheme that the labelled cases have."""
    target: str = ""
    """Phenotype column of a classification or a regression."""
    classes: tuple[str, ...] = ()
    """Class names in order; the last is the positive one of a two-class task."""
    others: tuple[str, ...] = Field((), exclude_if=lambda value: not value)
    """Values of the target column of cases that are no part of it."""
    cuts: tuple[float, ...] = Field((), exclude_if=lambda value: not value)
    """A numeric target becomes classes: the first up to and with the first cut, and so on; one fewer than classes."""
    quantiles: bool = Field(False, exclude_if=lambda value: not value)
    """A numeric target becomes classes of equal size in the cohort."""
    shuffle_seed: int | None = None
    """Negative control: targets are permuted over subjects within each role, anew for each training's seed."""
    control: Literal["", "positive", "negative"] = ""
    split: SplitProtocol = SplitProtocol()
    metrics: tuple[Metric, ...] = ()
    surface_tolerance_mm: float = Field(1.0, gt=0)
    """Of the normalised surface Dice: how far apart two surfaces may lie and still agree."""
    lesions: LesionRule | None = None
    """Of a segmentation that is also scored lesion by lesion."""
    published: tuple[Published, ...] = ()
    claims: tuple[str, ...] = Field((), exclude_if=lambda value: not value)
    """What was published and is no score of one model, such as a gain, with its source: sentences under the table."""
    basis: Basis = "confirmed"
    """Of the protocol: are cohort, labels and split known?"""
    test_subjects: int | None = None
    """Published test size, when known or deduced."""
    note: str = ""

    @property
    def regions(self) -> tuple[Region, ...]:
        """Regions of a segmentation, from its label scheme; empty for a classification."""
        return find_scheme(self.scheme) if self.scheme else ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "segmentation" and (not self.scheme or self.target):
            raise ValueError(f"segmentation benchmark {self.name!r} needs a label scheme and no target column")
        if self.kind == "classification" and (self.scheme or not self.target or len(self.classes) < 2):
            raise ValueError(f"classification benchmark {self.name!r} needs a target column and at least two classes")
        if self.kind == "regression" and (self.scheme or not self.target or self.classes):
            raise ValueError(f"regression benchmark {self.name!r} needs a target column and no classes")
        if self.cuts and (len(self.cuts) + 1 != len(self.classes) or list(self.cuts) != sorted(set(self.cuts))):
            raise ValueError(f"benchmark {self.name!r}: {len(self.classes)} classes need one rising cut fewer")
        if self.protocol == "fine-tune" and (self.kind == "regression" or self.cuts or self.quantiles):
            raise ValueError(f"benchmark {self.name!r}: regression, cuts and quantiles are for protocol 'probe' only")
        if self.protocol != "fine-tune" and self.kind == "segmentation":
            raise ValueError(f"benchmark {self.name!r}: a {self.protocol} of the whole image predicts no segmentation")
        if self.protocol == "prompt" and self.kind != "classification":
            raise ValueError(f"benchmark {self.name!r}: prompting tells classes, it predicts no number")
        for scheme in (self.scheme, *self.other_schemes) if self.scheme else ():
            find_scheme(scheme)
        if unknown := set(self.metrics) - set(METRICS[self.kind]):
            raise ValueError(f"benchmark {self.name!r}: metrics {sorted(unknown)} do not belong to {self.kind}")
        return self


PAPER = "BrainMVP, arXiv 2410.10604"
BOARD = "the paper's public leaderboard page"
SUMMARY = "third-party summary of the paper"
FOUR = ("t1", "t1c", "t2", "flair")


def _dice(ours: float, rival: float, scratch: float | None = None) -> tuple[Published, ...]:
    rows = [("BrainMVP", ours), ("M3AE (best listed rival)", rival)]
    rows += [] if scratch is None else [("UniFormer from scratch", scratch)]
    return tuple(
        Published(method=m, metric="dice", region="mean", value=v, source=SUMMARY, basis="unverified") for m, v in rows
    )


def _board(metric: Metric, value: float, region: str = "") -> Published:
    return Published(method="BrainMVP", metric=metric, value=value, region=region, source=BOARD, basis="unverified")


def _number(method: str, metric: Metric, value: float, source: str, basis: Basis = "unverified") -> Published:
    return Published(method=method, metric=metric, value=value, source=source, basis=basis)


def _segmentation(
    name: str, title: str, dataset: str, modalities: tuple[str, ...], scheme: str, **more: object
) -> Benchmark:
    values = {
        "metrics": (*SEGMENTATION_METRICS, *(LESION_METRICS if "lesions" in more else ())),
        "split": SplitProtocol(note="split of the paper unknown: 70/10/20 by subject"),
    }
    return Benchmark.model_validate(
        {"name": name, "title": title, "kind": "segmentation", "datasets": (dataset,), "modalities": modalities,
         "scheme": scheme, **values, **more}
    )  # fmt: skip


def _classification(name: str, title: str, dataset: str, classes: tuple[str, ...], **more: object) -> Benchmark:
    values = {
        "modalities": ("t1",),
        "target": "diagnosis",
        "metrics": CLASSIFICATION_METRICS,
        "split": SplitProtocol(
            stratify=(str(more.get("target", "diagnosis")), "site"),
            note="split of the paper unknown: stratified, test of the deduced size",
        ),
    }
    return Benchmark.model_validate(
        {"name": name, "title": title, "kind": "classification", "datasets": (dataset,), "classes": classes,
         **values, **more}
    )  # fmt: skip


# Of BraTS 2023: dilation in voxels of 1 mm, by challenge (BraTS-2023-Metrics, get_challenge_parameters).
_GLIOMA, _METASTASES = LesionRule(dilation=3, min_volume_mm3=50), LesionRule(dilation=1, min_volume_mm3=2)
_STROKE = LesionRule()
_PHANTOM = {"split": SplitProtocol(), "note": "phantoms deformed from the MNI152 template: known answers, no patients"}

_REGISTERED: tuple[Benchmark, ...] = (
    _segmentation(
        "phantom-tumour", "Phantom tumour", "phantom-bids", FOUR, "brats2023", **_PHANTOM,
        surface_tolerance_mm=3.0, lesions=LesionRule(dilation=1, min_volume_mm3=50),
    ),
    _classification("phantom-diagnosis", "Phantom diagnosis", "phantom-bids", ("control", "patient"), **_PHANTOM),
    _classification(
        "phantom-control", "Phantom positive control (strong effect)", "phantom-bids", ("small", "large"),
        **{**_PHANTOM, "target": "control_group", "control": "positive"},
    ),
    _classification(
        "phantom-shuffled", "Phantom negative control (shuffled diagnosis)", "phantom-bids", ("control", "patient"),
        **{**_PHANTOM, "shuffle_seed": 20240229, "control": "negative"},
    ),
    _segmentation(
        "phantom-stroke", "Phantom stroke", "phantom-stroke", ("flair", "dwi", "adc"), "stroke", **_PHANTOM,
        surface_tolerance_mm=3.0, lesions=_STROKE,
    ),
    _segmentation(
        "phantom-schwannoma", "Phantom schwannoma", "phantom-schwannoma", ("t1",), "schwannoma", **_PHANTOM,
        surface_tolerance_mm=3.0,
    ),
    _segmentation(
        "phantom-tissue", "Phantom tissue", "phantom-tissue", ("t1", "t1c", "flair"), "mrbrains13",
        split=SplitProtocol(), surface_tolerance_mm=3.0,
        note="phantoms deformed from the MNI152 template: the largest share of CSF, grey and white matter in a voxel; "
        "a contrast-enhanced T1 stands where MRBrainS13 has T1-IR",
    ),
    _classification(
        "phantom-grade", "Phantom tumour or none, of four modalities", "phantom-bids", ("none", "tumour"),
        modalities=FOUR, others=("stroke", "schwannoma"), **{**_PHANTOM, "target": "lesion"},
    ),
    _segmentation(
        "brats2023-ped", "BraTS2023-PED", "brats2023-ped", FOUR, "brats2023", basis="inferred", lesions=_GLIOMA,
        other_schemes=("brats-ped2024",),
        published=(*_dice(0.7680, 0.7414, 0.7252), _board("hd95", 13.93, "ET")),
        note="99 cases; labels 0..3 as in the other BraTS2023 sets is inferred: check on the files",
    ),
    _segmentation(
        "brats2023-met", "BraTS2023-MET", "brats2023-met", FOUR, "brats2023", basis="inferred", lesions=_METASTASES,
        published=(*_dice(0.7367, 0.7039), _board("dice", 0.707, "ET"), _board("hd95", 20.37, "ET")),
        note="238 cases; BraTS-MET-00232-000-t2w is corrupt at the source",
    ),
    _segmentation(
        "isles22", "ISLES22", "isles22", ("flair", "dwi", "adc"), "stroke", lesions=_STROKE, surface_tolerance_mm=2.0,
        published=(*_dice(0.8660, 0.8632), _board("hd95", 2.64, "stroke")),
        split=SplitProtocol(shares=(0.75, 0.1, 0.15), note="shipped: 202 train, 36 test; validation from train"),
        test_subjects=36, note="238 of 250 cases",
    ),
    _segmentation(
        "mrbrains13", "MRBrainS13", "mrbrains13", ("t1", "t1c", "flair"), "mrbrains13", basis="unverified",
        published=(*_dice(0.8027, 0.7729), _board("dice", 0.8104, "CSF")),
        note="20 cases; the paper's T1CE is probably T1-IR; label values 1 CSF, 2 GM, 3 WM unverified",
    ),
    _segmentation(
        "vsseg", "VSseg", "vsseg", ("t1",), "schwannoma", basis="inferred", published=_dice(0.8364, 0.7931),
        note="242 cases; the paper says T1, the reference code T2",
    ),
    _segmentation(
        "upenn-gbm", "UPENN-GBM", "upenn-gbm", FOUR, "brats2021", basis="unverified", lesions=_GLIOMA,
        published=(*_dice(0.9001, 0.8963), _board("dice", 0.8849, "ET")),
        note="127 cases; very probably seen, unlabelled, in the paper's pre-training (BraTS2021)",
    ),
    _classification(
        "brats2018", "BraTS2018 HGG vs LGG", "brats2018", ("LGG", "HGG"), modalities=FOUR, target="grade",
        basis="inferred", test_subjects=57,
        published=(
            _number("BrainMVP", "accuracy", 0.8596, f"{SUMMARY}; leaderboard agrees", "confirmed"),
            _number("BrainMVP", "auroc", 0.9452, SUMMARY), _number("BrainMVP", "f1", 0.8324, SUMMARY),
            _number("UNETR (best listed rival)", "accuracy", 0.7895, SUMMARY),
            _number("UniFormer from scratch", "auroc", 0.7719, SUMMARY),
        ),
        note="285 cases",
    ),
    _classification(
        "adni", "ADNI MCI vs HC", "adni", ("HC", "MCI"), others=("AD",), basis="inferred", test_subjects=238,
        published=(
            _number("BrainMVP", "accuracy", 0.6218, "summary B (conflicts with 0.6765)", "inferred"),
            _number("BrainMVP", "accuracy", 0.6765, "summary A and leaderboard (conflict with 0.6218)", "inferred"),
            _number("BrainMVP", "auroc", 0.6964, SUMMARY), _number("BrainMVP", "f1", 0.6609, SUMMARY),
            _number("MoCoV3 (best listed rival)", "accuracy", 0.6092, SUMMARY),
            _number("UniFormer from scratch", "accuracy", 0.5546, SUMMARY),
        ),
        note="1348 cases",
    ),
    _classification(
        "adhd-200", "ADHD-200 ADHD vs HC", "adhd-200", ("HC", "ADHD"), basis="inferred", test_subjects=154,
        published=(
            _number("BrainMVP", "accuracy", 0.6948, "summary B (conflicts with 0.6883)", "inferred"),
            _number("BrainMVP", "accuracy", 0.6883, "summary A and leaderboard (conflict with 0.6948)", "inferred"),
            _number("TransVW (best listed rival)", "accuracy", 0.6818, SUMMARY),
        ),
        note="767 cases",
    ),
    _classification(
        "abide-i", "ABIDE-I autism vs HC", "abide-i", ("HC", "autism"), basis="inferred", test_subjects=165,
        published=(
            _number("BrainMVP", "accuracy", 0.6545, "summary B (conflicts with 0.697)", "inferred"),
            _number("BrainMVP", "accuracy", 0.697, "leaderboard (conflicts with 0.6545)", "inferred"),
            _number("GVSL (best listed rival)", "accuracy", 0.6424, SUMMARY),
        ),
        note="819 cases",
    ),
)  # fmt: skip

BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _REGISTERED}
"""Every registered benchmark by name, whether or not its data are at hand."""

PHANTOM_BENCHMARKS: tuple[str, ...] = ("phantom-tumour", "phantom-diagnosis", "phantom-control", "phantom-shuffled")
"""Those of the demo; the other phantoms are the twins of ISLES22, VSseg, MRBrainS13 and BraTS2018."""


def find_benchmark(name: str) -> Benchmark:
    """Return a registered benchmark; raises KeyError listing the known names."""
    try:
        return BENCHMARKS[name]
    except KeyError:
        raise KeyError(f"unknown benchmark {name!r}; known: {', '.join(BENCHMARKS)}") from None


def has_data(benchmark: Benchmark, datasets: list[str]) -> bool:
    """Return whether any dataset of the benchmark is among those of the store."""
    return any(name in datasets for name in benchmark.datasets)
