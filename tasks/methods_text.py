"""The paragraphs of a paper's methods section, written from the records of a workspace, with their citations.

Every sentence states what a record says: a config, a spec, a selection, a table of cases. What is not recorded is not
written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from models.config import MadeFrom, TrainingConfig
from models.selection import read_selection
from models.spec import PreprocessSpec
from tasks.benchmarks import Benchmark
from tasks.finetune import Finetuning, read_json
from tasks.references import Citations
from tasks.report import software_versions
from tasks.rows import Run
from tasks.splits import IMPORTED, ROLES, Subject, given, read_record
from tasks.summary import MIXED, PRETRAINED, UNBOUNDED
from tasks.tables import METRIC_NAMES

if TYPE_CHECKING:
    from tasks.evaluation import Cohort
    from tasks.report_content import Made

METHODS: dict[str, tuple[str, str]] = {
    "brainmvp": ("BrainMVP", "brainmvp"),
    "brainmvp_unet": ("BrainMVP", "brainmvp"),
    "anatcl": ("AnatCL", "anatcl"),
    "simclr": ("SimCLR", "simclr"),
    "yaware": ("y-Aware contrastive learning", "yaware"),
    "expw": ("the exponentially weighted contrast for regression", "expw"),
    "age_regression": ("regression of the age", ""),
    "cinp": ("CINP", "cinp"),
    "image_mae": ("masked autoencoding", "mae"),
    "mae": ("masked autoencoding", "mae"),
    "mae_unet": ("masked autoencoding", "mae"),
    "simclr_crops": ("SimCLR on crops", "simclr"),
    "simclr_crops_unet": ("SimCLR on crops", "simclr"),
}
"""Recipe -> what a paper calls it, and its reference."""
NETWORKS: dict[str, tuple[str, str]] = {
    "uniformer": ("A 3D UniFormer", "uniformer"),
    "unet3d": ("A 3D U-Net with residual blocks", ""),
    "resnet3d": ("A 3D ResNet", "resnet"),
    "vit3d": ("A 3D vision transformer", "vit"),
    "swin_unetr": ("SwinUNETR", "swin_unetr"),
    "dynunet": ("A U-Net after nnU-Net's rules", "nnunet"),
}
"""Kind of network -> what a paper calls it, and its reference."""
OPTIMISERS = {"adamw": "AdamW", "adam": "Adam", "muon": "Muon"}


@dataclass(frozen=True)
class MethodsText:
    """What a paper needs: paragraphs with numbered citations, and the references in that order."""

    paragraphs: tuple[str, ...]
    references: tuple[str, ...]

    def to_markdown(self) -> str:
        """Return the section as Markdown."""
        cited = [f"{number}. {text}" for number, text in enumerate(self.references, start=1)]
        return "\n\n".join(["# Methods", *self.paragraphs, "## References", "\n".join(cited)]) + "\n"


def methods_text(
    made: Made,
    trainings: Sequence[Finetuning],
    cohorts: Sequence[Cohort],
    replicates: int,
    shares: Sequence[float] = (),
    missing: bool = False,
) -> MethodsText:
    """Return the methods of an evaluation.

    cohorts: also those without data, and those scored on the grids of label files; shares: of the labels that rows were
    trained on besides all; missing: whether segmentations were predicted again without single modalities.
    """
    cited = Citations()
    tested = [cohort for cohort in cohorts if cohort.selected and not cohort.native]
    benchmarks = [cohort.benchmark for cohort in tested]
    paragraphs = [
        data_sentences(made.cases),
        preprocessing_sentences(made.store.spec, cited),
        split_sentences(made, tested),
        *runs_sentences(made.runs, cited),
        *(finetuning_sentences(cohort, trainings) for cohort in tested),
        *(others_sentences(cohort) for cohort in tested),
        scratch_sentences(trainings, cited),
        further_sentences(
            shares,
            missing,
            native=any(cohort.native for cohort in cohorts),
            mixed=any(one.row == MIXED for one in trainings),
        ),
        statistics_sentences(benchmarks, trainings, replicates, cited, made.runs[0].name) + gain_sentences(trainings),
        software_sentence(cited),
    ]
    return MethodsText(tuple(text for text in paragraphs if text), tuple(cited.references))


def data_sentences(cases: pd.DataFrame) -> str:
    """Return what was stored and what was left out; `cases` is the table of the store."""
    stored, out = (cases[cases["status"] == status] for status in ("stored", "quarantined"))
    named = []
    for dataset, part in stored.groupby("dataset", sort=True):
        scans = int(part["modalities"].map(len).sum())
        subjects = part["subject"].nunique()
        counts = (counted(subjects, "subject"), counted(len(part), "case"), counted(scans, "image"))
        named.append(f"{dataset} ({', '.join(counts)})")
    text = f"Data came from {listed(named)}."
    if len(out):
        reasons = [f"{reason} ({count})" for reason, count in out["reason"].value_counts().sort_index().items()]
        text += f" {counted(len(out), 'further case')} could not be used: {listed(reasons)}."
    return text


def preprocessing_sentences(spec: PreprocessSpec, cited: Citations) -> str:
    """Return how voxels, and connectomes where there are any, were made."""
    sentences = [f"Images were preprocessed with brainloom (spec {spec.name}, {spec.content_digest()[:12]})."]
    if spec.bias_correction == "n4":
        sentences.append(f"Bias fields were corrected with N4{cited.cite('n4')}.")
    if spec.registration != "none":
        template = f"MNI152{cited.cite('mni152')}" if spec.template == "mni152" else "a template of our own"
        sentences.append(
            f"The reference scan of each case was registered ({spec.registration}) to {template} with "
            f"ANTs{cited.cite('ants')}, and the other scans moved with it."
        )
    size = " x ".join(map(str, spec.grid))
    if spec.frame == "template":
        placed = f"resampled once onto a fixed grid of {size} voxels of {spec.spacing_mm:g} mm"
    else:
        placed = (
            f"brought to RAS+ axes and {spec.spacing_mm:g} mm isotropic voxels on the grid of a reference scan, at "
            f"most {size} voxels"
        )
    sentences.append(f"Images were {placed} (trilinear; labels: nearest neighbour) and cropped to their foreground.")
    if spec.brain_mask == "file":
        sentences.append("Voxels outside the brain masks were set to 0.")
    if spec.tissue == "approximate":
        sentences.append("Maps of grey matter were approximated from T1 images by mixture fitting with MNI priors.")
    if spec.intensity == "percentiles":
        low, high = spec.percentiles
        region = "the foreground" if spec.percentile_region == "foreground" else "the whole volume"
        sentences.append(
            f"Intensities between the percentiles {low:g} and {high:g} of {region} were scaled to [0, 1] and clipped."
        )
    else:
        sentences.append("Intensities were kept.")
    if spec.connectome is not None:
        sentences.append(_connectome_sentence(spec, cited))
    return " ".join(sentences)


def _connectome_sentence(spec: PreprocessSpec, cited: Citations) -> str:
    made = spec.connectome
    assert made is not None
    cleaned = [*made.confounds, *(["global signal"] if made.global_signal else [])]
    transformed = ", Fisher-transformed" if made.fisher_z else ""
    return (
        f"Functional connectomes are {made.kind}s of {len(made.regions)} regions of the atlas {made.atlas}"
        f"{transformed} (covariance: {made.covariance}); {listed(cleaned) or 'nothing'} was regressed out of BOLD "
        f"images and frames with a displacement above {made.fd_threshold_mm:g} mm were left out; at least "
        f"{made.min_frames} frames were required. They were computed with nilearn{cited.cite('nilearn')}."
    )


def split_sentences(made: Made, cohorts: Sequence[Cohort]) -> str:
    """Return how subjects were divided, and which test subjects a pre-training had seen."""
    counts = [f"{int((made.split['split'] == role).sum())} {role}" for role in ROLES]
    imported = _imported(made)
    return (
        f"Subjects, never single images, were divided into {listed(counts)} (split {made.tables.split!r}, digest "
        f"{made.tables.split_digest[:12]}){_drawn(len(made.split), imported)}; near-duplicate subjects, found by an "
        f"intensity-normalised fingerprint of the images, share a role.{imported_sentences(imported)}"
        f"{crosswalk_sentence(made.tables)} {' '.join([leak_sentences(made.runs, cohorts), *made.unchecked])}"
    )


def _imported(made: Made) -> list[dict[str, Any]]:
    """Return the files that roles of the split were taken from, as its record has them."""
    path = made.workspace / "splits" / f"{made.tables.split}.parquet"
    return list(read_record(path).get(IMPORTED, [])) if path.exists() else []


def _drawn(subjects: int, imported: Sequence[Mapping[str, Any]]) -> str:
    """Return that roles were drawn by strata, where they were; empty where files gave all of them."""
    if not imported:
        return ", stratified"
    return ", stratified where no file gave the role" if sum(map(given, imported)) < subjects else ""


def imported_sentences(imported: Sequence[Mapping[str, Any]]) -> str:
    """Return from which files roles of the split were taken; empty when it was drawn."""
    sentences = []
    for one in imported:
        rest = f"; other subjects of the same data became {one['rest']}" if one.get("rest") else ""
        sentences.append(
            f" The roles of {counted(one['subjects'], 'subject')} of {listed(one['datasets'])} were taken from the "
            f"file {one['file']} (SHA-256 {one['sha256'][:12]}){rest}."
        )
    return "".join(sentences)


def leak_sentences(runs: Sequence[Run], cohorts: Sequence[Cohort]) -> str:
    """Return which test subjects a pre-training had seen, by benchmark, and what became of them."""
    leaking = [cohort for cohort in cohorts if cohort.leaks]
    if not leaking:
        return "No pre-training has seen a test subject, unless its weights were imported."
    left_out = listed([f"{len(one.leaks)} of {len(_test_subjects(one))} of {one.benchmark.title}" for one in leaking])
    unknown = (
        " Which subjects imported weights were trained on is not known." if any(one.origin for one in runs) else ""
    )
    return f"Test subjects that a pre-training had seen were left out of every number: {left_out}.{unknown}"


def _test_subjects(cohort: Cohort) -> set[Subject]:
    return {(case.dataset, case.subject) for case in cohort.of_role("test")}


def crosswalk_sentence(tables: MadeFrom) -> str:
    """Return what crosswalks did; empty without any."""
    if not (digest := tables.crosswalks_digest):
        return ""
    return f" So do subjects that are one person under several ids, by tables of ids (digest {digest[:12]})."


def runs_sentences(runs: Sequence[Run], cited: Citations) -> list[str]:
    """Return where the encoders come from; of several, which row each is."""
    texts = [pretraining_sentences(run.folder, cited) + _repeated(run) for run in runs]
    if len(runs) == 1:
        return texts
    return [f"Row {run.name}: {text}" for run, text in zip(runs, texts, strict=True)]


def _repeated(run: Run) -> str:
    """Return that a pre-training was repeated, and from which seeds."""
    if not run.repeats:
        return ""
    seeds = [str((read_json(folder / "run.json") or {}).get("seed", "unknown")) for folder in run.repeats]
    return (
        f" It was repeated from seed{'s' if len(seeds) > 1 else ''} {listed(seeds)}, and every one of the "
        f"{len(run.folders)} pre-trainings was fine-tuned; scores are averages over all of them."
    )


def pretraining_sentences(folder: Path, cited: Citations) -> str:
    """Return where an encoder comes from: its recipe, or the file that it was imported from."""
    if origin := (read_json(folder / "done.json") or {}).get("origin"):
        return (
            f"The pre-trained encoder was imported from the file {origin['file']}; which subjects it was trained on is "
            "not recorded in it."
        )
    config = TrainingConfig.model_validate(read_json(folder / "run.json"))
    name, reference = METHODS.get(config.recipe.removesuffix("_tiny"), (config.recipe, ""))
    tiny = ", at a reduced size" if config.recipe.endswith("_tiny") else ""
    cases = [case for case in read_selection(folder / "selection.parquet") if case.role == "train"]
    subjects = len({(case.dataset, case.subject) for case in cases})
    return (
        f"{_network(config, cited)} was pre-trained with {name}{cited.cite(*filter(None, [reference]))} "
        f"(recipe {config.recipe}, preset {config.preset}{tiny}) on {counted(len(cases), 'case')} of "
        f"{counted(subjects, 'subject')}: "
        f"{_schedule(config)}, seed {config.seed}."
    )


def scratch_sentences(trainings: Sequence[Finetuning], cited: Citations) -> str:
    """Return which networks were trained from scratch, where there are several rows of that kind."""
    found = {one.row: one.config for one in trainings if not one.config.init_from}
    if len(found) < 2:
        return ""
    named = [f"{row} is {_uncapitalised(_network(config, cited))}" for row, config in found.items()]
    return f"Rows from scratch: {listed(named)}."


def gain_sentences(trainings: Sequence[Finetuning]) -> str:
    """Return what the tables of gains compare, where there are such (tasks.gains)."""
    rows = {one.row for one in trainings} - {MIXED}
    if len(rows) < 3:
        return ""
    return (
        " Each pre-training was also compared with training its own network from scratch and with every baseline, "
        "Holm-corrected over all of these tests of a benchmark."
    )


def _network(config: TrainingConfig, cited: Citations) -> str:
    name, reference = NETWORKS[config.network.kind]
    return f"{name}{cited.cite(*filter(None, [reference]))}"


def _uncapitalised(text: str) -> str:
    return f"{text[0].lower()}{text[1:]}"


def _schedule(config: TrainingConfig) -> str:
    batch = config.data.batch_size * config.world_size * config.accumulation
    crop = "whole images" if not any(config.data.crop) else f"crops of {' x '.join(map(str, config.data.crop))} voxels"
    optimiser = config.optimiser
    return (
        f"{counted(config.epochs, 'epoch')}, {crop}, {counted(batch, 'case')} a step, {OPTIMISERS[optimiser.kind]} "
        f"with a learning rate of {optimiser.lr:g}, a weight decay of {optimiser.weight_decay:g} and a "
        f"{optimiser.schedule} schedule"
    )


def finetuning_sentences(cohort: Cohort, trainings: Sequence[Finetuning]) -> str:
    """Return cohort and budget of one benchmark; empty when nothing was trained for it."""
    benchmark, own = cohort.benchmark, cohort.own(trainings)
    if not own:
        return ""
    config = own[0].config
    cases = read_selection(own[0].folder / "selection.parquet")
    subjects = {role: len({(c.dataset, c.subject) for c in cases if c.role == role}) for role in ROLES}
    counts = listed([f"{count} {role}" for role, count in subjects.items()])
    counts += f", of whom {subjects['test'] - len(cohort.leaks)} count" if cohort.leaks else ""
    seeds = len({one.own_seed for one in own})
    trained = "once" if seeds == 1 else f"{seeds} times from different seeds"
    rows = listed(list(dict.fromkeys(one.row for one in own)))
    what = (
        f"segmentation of {listed([region.name for region in benchmark.regions])}"
        if benchmark.kind == "segmentation"
        else f"classification into {listed(list(benchmark.classes))}"
    )
    return (
        f"{benchmark.title} ({what} from {listed(list(benchmark.modalities))}; subjects: {counts}): each row ({rows}) "
        f"was trained {trained} with the same budget, {_schedule(config)}."
        f"{_odd_sentences(own)}"
    )


def others_sentences(cohort: Cohort) -> str:
    """Return which rows of a benchmark are predictions of others; empty without any."""
    named = [one.name for one in cohort.others]
    if not named:
        return ""
    rows = f"row {named[0]} has" if len(named) == 1 else f"rows {listed(named)} have"
    return (
        f"{cohort.benchmark.title}: the {rows} label maps that others predicted, read from files; how, and on which "
        "subjects, their networks were trained is not recorded. They were scored and compared as all rows were; maps "
        "on the grids of source scans were first moved onto the scored grid by nearest neighbour."
    )


def _odd_sentences(own: Sequence[Finetuning]) -> str:
    """Return the schedule of rows whose network takes images of another size; the mix has a note of its own."""
    odd = {one.row: _schedule(one.config) for one in own if one.config.data.crop != own[0].config.data.crop}
    return "".join(f" Row {row}: {schedule}." for row, schedule in odd.items())


def further_sentences(shares: Sequence[float], missing: bool, native: bool, mixed: bool = False) -> str:
    """Return what was trained, predicted or scored besides: fewer labels, absent modalities, grids of label files."""
    sentences = []
    if shares:
        named = listed([f"{100 * share:g} %" for share in shares])
        sentences.append(
            f"All rows{' but the mix' if mixed else ''} were also trained on {named} of the training subjects, drawn "
            "by class and anew for each seed, smaller shares inside larger ones, with as many optimiser steps."
        )
    if missing:
        sentences.append(
            "Segmentations of several modalities were also predicted without each one, its channel filled with zeros "
            "or with the template of the modality that the pre-training had learned."
        )
    if native:
        sentences.append(
            "Segmentations were also scored on the grids of their label files, onto which predicted masks were moved "
            "by nearest neighbour; outside the stored extent nothing counts as predicted."
        )
    return " ".join(sentences)


def statistics_sentences(
    benchmarks: Sequence[Benchmark],
    trainings: Sequence[Finetuning],
    replicates: int,
    cited: Citations,
    first: str = PRETRAINED,
) -> str:
    """Return metrics, intervals and tests; first: the row that the others are compared with."""
    firsts = list({one.benchmark: one.row for one in reversed(trainings)}.values()) or [first]
    if set(firsts) == {PRETRAINED}:
        compared = "the pre-trained one"
    else:
        compared = f"the row {firsts[0]}" if len(set(firsts)) == 1 else "the first row of their table"
    metrics = dict.fromkeys(metric for benchmark in benchmarks for metric in benchmark.metrics)
    named = [METRIC_NAMES[metric] for metric in metrics]
    rows = len({(one.benchmark, one.row) for one in trainings})
    several = len({one.seed for one in trainings}) > 1
    seeds = "; seeds are averaged inside each replicate, their spread is given beside" if several else ""
    return (
        f"Test predictions were scored by {listed(named)}. Intervals are 95 % BCa bootstrap "
        f"intervals{cited.cite('bca')} over subjects ({replicates} replicates), widened for few "
        f"subjects{cited.cite('hesterberg')}{seeds}. {_unbounded_sentence(list(metrics), cited)}"
        f"Rows were compared with {compared} by paired bootstrap tests over the same draws, corrected with "
        f"Holm's method{cited.cite('holm')} over all rows of a benchmark; {rows} rows were trained in all. Ranks are "
        f"those of bootstrap samples of the test subjects{cited.cite('ranks')}."
    )


def _unbounded_sentence(metrics: Sequence[str], cited: Citations) -> str:
    """Return how intervals of metrics without an upper bound are made, and a space; nothing without such metrics."""
    if not (named := [METRIC_NAMES[metric] for metric in metrics if metric in UNBOUNDED]):
        return ""
    return (
        f"Those of {listed(named)}, which have no upper bound, are t intervals over subjects with Hall's correction "
        f"for skewness{cited.cite('hall')}, at either end the wider of it and of the plain t interval. "
    )


def software_sentence(cited: Citations) -> str:
    """Return the software with its versions."""
    known = {"torch", "monai", "scikit-learn", "numpy", "scipy", "dask"}
    named = [
        f"{name} {version}{cited.cite(*([name] if name in known else []))}" for name, version in software_versions()
    ]
    return f"Software: {listed(named)}."


def counted(number: int, what: str) -> str:
    """Return e.g. `1 case` or `3 cases`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def listed(names: Sequence[str]) -> str:
    """Return e.g. `a, b and c`."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"
