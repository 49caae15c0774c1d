"""What a segmentation loses when one modality is absent: zeros in its place against its learned template.

Each test case is predicted again without each of its modalities, once with either filling; Dice by region. The
templates are those of one pre-training for every row, also for those that were never trained with them.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from models.gpu_turn import need_gpus
from models.records import Record, SelectedCase, digest_of
from models.scoring import dice
from tasks.case_map import HERE, CaseMap
from tasks.evaluation import Cohort
from tasks.finetune import Finetuning, read_json
from tasks.scores import RowKey, region_masks
from tasks.statistics import Floats, Interval, bootstrap_interval, draw_subjects, mean_metric, paired_test
from tasks.summary import MEAN, Line
from tasks.tables import FurtherTable, cell
from tasks.trained_scores import RowToScore, gather_scores, trained_masks

if TYPE_CHECKING:
    from models.data import CaseDataset
    from models.objectives.base import CaseInfo
    from models.objectives.supervised import Supervised

FILLINGS: tuple[str, ...] = ("zero", "template")
NOTHING = "nothing"
"""Dropped modality of the predictions that the training wrote itself."""


def applies(cohort: Cohort) -> bool:
    """Return whether a modality of this benchmark can be dropped: a segmentation of two or more, with data."""
    return cohort.benchmark.kind == "segmentation" and len(cohort.benchmark.modalities) > 1 and bool(cohort.selected)


def score_missing(
    cohort: Cohort, trainings: Sequence[Finetuning], pretrained: Path, folder: Path, work: CaseMap = HERE
) -> tuple[pd.DataFrame, int]:
    """Return Dice by dropped modality and filling in long form, and how many trainings were scored now.

    The columns are those of the scores and `dropped`, `filling`. Unchanged trainings are read back. work: where cases
    are predicted. Raises ValueError when the pre-training has no learned template of a modality.
    """
    bank = _weights(pretrained)
    rows = [
        RowToScore(
            RowKey(training.benchmark, training.row, training.seed),
            cohort,
            digest_of([_weights(training.folder), bank]),
            partial(_score, cohort=cohort, folder=training.folder, pretrained=pretrained, work=work),
        )
        for training in trainings
    ]
    return gather_scores(rows, folder / "missing")


def _weights(folder: Path) -> str:
    return str((read_json(folder / "done.json") or {}).get("weights_digest", ""))


PASS = 20
"""Voxels whose scores take as long as one voxel through a small network; through a large one it is some hundred."""


def _score(key: RowKey, cohort: Cohort, folder: Path, pretrained: Path, work: CaseMap) -> pd.DataFrame:
    import torch

    test = cohort.of_role("test")
    drop = DropEach(cohort.for_workers(), tuple(test), key, folder, pretrained)
    passes = len(FILLINGS) * len(cohort.benchmark.modalities)
    if torch.cuda.is_available():
        need_gpus()  # here: workers have nobody to ask
    # Workers without a GPU of their own would share the one that this process has, or be slower without.
    place = HERE if torch.cuda.is_available() and not work.own_gpus else work
    voxels = PASS * passes * math.prod(cohort.store.spec.grid)
    return pd.DataFrame([line for lines in place(drop, range(len(test)), voxels) for line in lines])


@dataclass(frozen=True)
class DropEach:
    """Predicts a case without each of its modalities; each process that does so loads networks and store once."""

    cohort: Cohort
    """As small as a worker needs it."""
    cases: tuple[SelectedCase, ...]
    """For testing."""
    key: RowKey
    folder: Path
    """Of the fine-tuning."""
    pretrained: Path

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("objective", "data")}

    @cached_property
    def objective(self) -> Supervised:
        """The fine-tuned network with the templates of the pre-training."""
        from models.filling import learned_templates  # torch and MONAI
        from models.finished import read_training
        from models.predict import load_objective

        objective = load_objective(self.folder)
        modalities, spec = self.cohort.benchmark.modalities, self.cohort.store.spec
        objective.use_templates(learned_templates(read_training(self.pretrained), modalities, spec))
        return objective

    @cached_property
    def data(self) -> CaseDataset:
        """All cases, of which one is read at a time."""
        from models.data import CaseDataset

        return CaseDataset(self.cohort.store.url, self.cases, self.objective.sampler(), "test")

    def __call__(self, index: int) -> list[dict[str, Any]]:
        """Return the Dice of one case, by its place among them, by dropped modality, filling and region."""
        benchmark, objective, case = self.cohort.benchmark, self.objective, self.data.cases[index]
        truth = region_masks(self.cohort.label(case), benchmark.regions, benchmark.scheme, case.case)
        whole = dice(trained_masks(self.cohort, self.folder, case).astype(bool), truth)
        rows = [line for filling in FILLINGS for line in self._lines(case, (NOTHING, filling), whole)]
        for modality, absent in without_each(self.data.info(index), objective):
            for filling in FILLINGS:
                objective.use_missing(filling)
                found = objective.predict(absent, self.data.reader(index))["regions"].astype(bool)
                rows += self._lines(case, (modality, filling), dice(found, truth))
        return rows

    def _lines(self, case: SelectedCase, what: tuple[str, str], values: Sequence[float]) -> list[dict[str, Any]]:
        common = {"benchmark": self.key.benchmark, "row": self.key.row, "seed": self.key.seed, "dataset": case.dataset}
        common |= {"case": case.case, "subject": case.subject, "metric": "dice", "target": "", "note": ""}
        common |= {"dropped": what[0], "filling": what[1]}
        regions = zip(self.cohort.benchmark.regions, values, strict=True)
        return [{**common, "region": region.name, "value": value} for region, value in regions]


def without_each(info: CaseInfo, objective: Supervised) -> Iterator[tuple[str, CaseInfo]]:
    """Yield each input modality that the case has and the case without it; nothing when it has only one."""
    here = objective.channels.present(info)
    for k in here if len(here) > 1 else []:
        absent = objective.indices[k]
        present = tuple(has and i != absent for i, has in enumerate(info.present))
        yield objective.settings.modalities[k], replace(info, present=present)


class MissingLine(Record):
    """Mean Dice of one row without one modality, by filling, and what the template gains over zeros."""

    row: str
    dropped: str
    n: int
    """Subjects that have the modality."""
    zero: Line
    template: Line
    gain: Line


class MissingTable(FurtherTable):
    """Dice by dropped modality of one benchmark."""

    lines: tuple[MissingLine, ...]
    templates_of: str = "the pre-training"

    @property
    def header(self) -> list[str]:
        """Printed column names."""
        return ["row", "without", "n", "mean Dice, zeros", "mean Dice, template", "template - zeros"]

    @property
    def body(self) -> list[list[str]]:
        """Printed cells."""
        return [
            [line.row, line.dropped, str(line.n), cell(line.zero), cell(line.template), cell(line.gain)]
            for line in self.lines
        ]

    @property
    def statements(self) -> list[str]:
        """Sentences under the table."""
        return [
            "Mean Dice over regions of test cases from which one modality was taken away: replaced by zeros, or by the "
            f"template that {self.templates_of} learned.",
            "Brackets: 95 % bootstrap intervals over subjects, seeds averaged; the last column is paired by subject.",
            f"Without {NOTHING}: the case as it is. Cases that lack the modality, or have no other, do not count.",
        ]

    def to_csv(self) -> str:
        """Return one number a line in full precision."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["row", "dropped", "filling", "n", "dice", "low", "high"])
        for line in self.lines:
            for name in ("zero", "template", "gain"):
                value: Line = getattr(line, name)
                writer.writerow([line.row, line.dropped, name, line.n, value.estimate, value.low, value.high])
        return buffer.getvalue()


def missing_table(
    title: str, scores: pd.DataFrame, replicates: int, seed: int = 0, templates_of: str = "the pre-training"
) -> MissingTable:
    """Return the table of one benchmark from the long-form scores of `score_missing`."""
    lines = []
    for (row, dropped), part in scores.groupby(["row", "dropped"], sort=False):
        zero, template = (_values(part[part["filling"] == filling]) for filling in FILLINGS)
        weights = draw_subjects(zero.shape[1], replicates, seed)
        gap, _ = paired_test(mean_metric(template), mean_metric(zero), weights)
        found = {
            name: bootstrap_interval(mean_metric(values), weights, at_bounds=zero.shape[1])
            for name, values in (("zero", zero), ("template", template))
        }
        found |= {} if dropped == NOTHING else {"gain": gap}
        numbers = {name: _line(str(row), found.get(name)) for name in ("zero", "template", "gain")}
        lines.append(MissingLine(row=str(row), dropped=str(dropped), n=zero.shape[1], **numbers))
    return MissingTable(title=title, lines=tuple(lines), templates_of=templates_of)


def _line(row: str, interval: Interval | None) -> Line:
    values = {} if interval is None else {key: getattr(interval, key) for key in ("estimate", "low", "high")}
    finite = {key: value for key, value in values.items() if np.isfinite(value)}
    return Line(benchmark="", row=row, metric="dice", region=MEAN, **finite)


def _values(part: pd.DataFrame) -> Floats:
    """Return the mean Dice over regions and cases by seed and subject (E, S)."""
    wide = part.pivot_table(index="seed", columns=["dataset", "subject"], values="value", aggfunc="mean")
    return wide.to_numpy(dtype=np.float64)
