"""The methods section of a comparison of frozen encoders: probes, and prompting with connectomes.

What it shares with an evaluation (data, preprocessing, pre-training, software) comes from tasks.methods_text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tasks.combat import SITE_MIN
from tasks.crosswalk import crosswalk_digest
from tasks.methods_text import (
    MethodsText,
    counted,
    data_sentences,
    listed,
    preprocessing_sentences,
    pretraining_sentences,
    software_sentence,
)
from tasks.probe_cohort import ProbeCohort
from tasks.probe_summary import NEIGHBOURS
from tasks.probing import EncoderRow
from tasks.prompt_seeds import PromptSettings
from tasks.references import Citations
from tasks.tables import METRIC_NAMES

if TYPE_CHECKING:
    from models.store import Store

VARIANTS: dict[str, str] = {
    "mean": "the cosine to the mean of the unit embeddings of a class",
    "nearest": "the cosine to the most similar embedding of a class",
    "knn": "the mean of the {k} highest cosines to a class",
}
"""What a variant of prompting compares an image by."""


@dataclass(frozen=True)
class Compared:
    """What a comparison was made of."""

    workspace: Path
    store: Store
    rows: tuple[EncoderRow, ...]
    """Of frozen encoders; the first is compared with the others."""
    cohorts: tuple[ProbeCohort, ...]
    """Those without cases are passed over."""

    @property
    def scored(self) -> list[ProbeCohort]:
        """The cohorts with data."""
        return [cohort for cohort in self.cohorts if cohort.cases]


def probe_methods(compared: Compared, combat: bool = False) -> MethodsText:
    """Return the methods of a comparison of frozen encoders by probes; combat: also after ComBat."""

    def method(cited: Citations) -> list[str]:
        return [probing_sentences(compared.rows, cited), *([combat_sentences(cited)] if combat else [])]

    return _text(compared, method, compared.rows[0].name)


def prompt_methods(compared: Compared, settings: PromptSettings) -> MethodsText:
    """Return the methods of prompting with connectomes."""

    def method(cited: Citations) -> list[str]:
        return [prompting_sentences(settings), prompt_baselines_sentences(settings, cited)]

    return _text(compared, method, f"{compared.rows[0].name} with the first support and variant")


def _text(compared: Compared, method: Callable[[Citations], Sequence[str]], first: str) -> MethodsText:
    cited, cases = Citations(), compared.store.cases().to_pandas()
    paragraphs = [
        data_sentences(cases),
        preprocessing_sentences(compared.store.spec, cited),
        *(encoder_sentences(row, cited) for row in compared.rows if row.model == "linear"),
        *(cohort_sentences(cohort) for cohort in compared.scored),
        independence_sentences(compared.workspace),
        *method(cited),
        fold_statistics_sentences(compared.scored, first, cited) if compared.scored else "",
        software_sentence(cited),
    ]
    return MethodsText(tuple(text for text in paragraphs if text), tuple(cited.references))


def encoder_sentences(row: EncoderRow, cited: Citations) -> str:
    """Return where the encoders of a row come from; of repetitions the first is described."""
    count, folders = len(row.encoders), [one.folder for one in row.encoders if one.folder]
    if not folders:
        return f"Row {row.name}: the network of the first row with random weights, {counted(count, 'initialisation')}."
    how = "an ensemble, whose predictions are averaged" if row.together == "ensemble" else "repetitions"
    several = f" ({counted(count, 'training')}, {how}; the first is described)" if count > 1 else ""
    return f"Row {row.name}{several}: {pretraining_sentences(folders[0], cited)}"


def cohort_sentences(cohort: ProbeCohort) -> str:
    """Return whom a table tests: target, subjects by class, folds."""
    benchmark, folds = cohort.benchmark, int(cohort.fold.max()) + 1
    if benchmark.kind == "regression":
        numbers = cohort.target.astype(np.float64)
        what = f"{benchmark.target}, {numbers.min():g} to {numbers.max():g}"
    else:
        sizes = [sum(case.target == name for case in cohort.cases) for name in benchmark.classes]
        what = listed([f"{size} {name}" for size, name in zip(sizes, benchmark.classes, strict=True)])
    control = ", a negative control with shuffled targets" if benchmark.shuffle_seed is not None else ""
    return (
        f"{benchmark.title}{control}: {counted(len(cohort.cases), 'subject')} of {listed(list(benchmark.datasets))} "
        f"({what}), one case each, in {folds} folds by subject, stratified by target, dataset and site (digest "
        f"{cohort.folds_digest[:12]})."
    )


def independence_sentences(workspace: Path) -> str:
    """Return who is kept apart from whom."""
    digest = crosswalk_digest(workspace)
    told = f", or are one person by tables of ids (digest {digest[:12]})," if digest else ""
    return (
        "Subjects that a pre-training was trained or validated on were left out, and so was whoever is one person with "
        f"them. Subjects that look alike by an intensity-normalised fingerprint of the images{told} count as one "
        "person and share a fold. Which subjects imported weights were trained on is not known."
    )


def probing_sentences(rows: Sequence[EncoderRow], cited: Citations) -> str:
    """Return how frozen features were probed."""
    neighbours = " and, in the rows so called, by distance-weighted nearest neighbours"
    more = neighbours if any(row.name.endswith(NEIGHBOURS) for row in rows) else ""
    windows = sorted({one.window for row in rows for one in row.encoders if one.window})
    sizes = listed([" x ".join(map(str, window)) for window in windows])
    tiled = f" (of encoders trained on crops, the mean over windows of {sizes} voxels that cover it)" if windows else ""
    return (
        f"Encoders were frozen. Features of the whole image{tiled}, of several modalities side by side with medians of "
        "the training folds for absent ones, standardised by the training folds, were probed by "
        f"logistic regression (classes) or ridge regression (numbers){cited.cite('scikit-learn')}{more}; strength or "
        "number of neighbours was chosen by inner cross-validation in the training folds, by balanced accuracy or R². "
        "Random weights, stored descriptors, age and sex, and no features were probed likewise, where they apply."
    )


def combat_sentences(cited: Citations) -> str:
    """Return how features were harmonised over sites for the tables beside."""
    return (
        f"In tables of their own, features were also harmonised over sites by ComBat{cited.cite('combat')}, as adapted "
        f"to imaging{cited.cite('combat_imaging')}: location and scale by parametric empirical Bayes, age and sex kept "
        "as covariates where they are known and are not the target, parameters fitted on the training folds alone. "
        f"Subjects of sites with fewer than {SITE_MIN} training subjects were left as they are."
    )


def prompting_sentences(settings: PromptSettings) -> str:
    """Return how images were diagnosed by connectomes."""
    ways = listed([VARIANTS[variant].format(k=settings.k) for variant in settings.variants])
    shares = listed([f"{share:.0%}".replace("%", " %") for share in settings.shares])
    return (
        "Images were told apart by the labelled connectomes of other subjects, in the space that both encoders share; "
        f"nothing was fitted. An image got the class that it is most similar to, by {ways}. Supports are connectomes "
        f"of the other folds, {shares} of them by class ({counted(settings.draws, 'draw')} of every part, seed "
        f"{settings.seed}); nobody is query and support at once. Pseudo-probabilities are the softmax of the "
        "similarities at the temperature that each training ended with."
    )


def prompt_baselines_sentences(settings: PromptSettings, cited: Citations) -> str:
    """Return what prompting is compared with."""
    network = ""
    if settings.classifier is not None:
        epochs = counted(settings.classifier.epochs, "epoch")
        network = f", and a transformer of connectomes trained for {epochs} in every fold"
    return (
        "It was compared with linear probes of the features of images, of connectomes and of both, with logistic "
        "regression on the connectomes and a support vector machine on their tangent "
        f"space{cited.cite('scikit-learn')}{network}. All but the probes of images see the connectome of who is "
        "tested, which prompting does not."
    )


def fold_statistics_sentences(cohorts: Sequence[ProbeCohort], first: str, cited: Citations) -> str:
    """Return metrics, intervals and tests."""
    metrics = dict.fromkeys(metric for cohort in cohorts for metric in cohort.benchmark.metrics)
    return (
        f"Scores ({listed([METRIC_NAMES[metric] for metric in metrics])}) were computed in every fold and averaged, "
        "never pooled. Intervals are 95 % t intervals of the mean over folds with the correction of Nadeau and "
        f"Bengio{cited.cite('nadeau')}; seeds were averaged in each fold. {first} was compared with every other row by "
        f"t-tests over folds with the same correction, corrected with Holm's method{cited.cite('holm')} over the rows "
        "of a table."
    )
