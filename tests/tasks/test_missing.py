"""Dice by dropped modality: one forward a case, modality and filling; tables that say so; nothing done twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from training_phantoms import DATASET, SPEC, make_training, write_blobs

from flows.case_workers import CaseWorkers
from infra.settings import Settings
from models.config import DataConfig, NetworkConfig, SegmentationConfig
from models.distributed import World
from models.objectives.base import CaseInfo
from models.objectives.segmentation import Segmentation
from models.store import open_store
from models.trainer import train
from tasks.benchmarks import BENCHMARKS
from tasks.evaluation import Cohort
from tasks.finetune import Finetuning
from tasks.missing import FILLINGS, NOTHING, applies, missing_table, score_missing
from tasks.summary import PRETRAINED

WORLD = World(0, 1, torch.device("cpu"))
TUMOUR = BENCHMARKS["phantom-tumour"].replace(name="blobs-tumour", datasets=(DATASET,))
NETWORK = NetworkConfig(embed_dims=(4, 8, 8, 16), depths=(1, 1, 1, 1), head_dim=8, mlp_ratio=1, decoder_dim=4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cohort, Finetuning, Path]:
    """A cohort with two test cases (the first lacks t1c), a fine-tuning and its pre-training."""
    folder = tmp_path_factory.mktemp("missing")
    url = str(folder / "store.zarr")
    cases = [case.replace(role="test" if case.row > 5 else "train") for case in write_blobs(url)]
    pretrained = folder / "p"
    train(make_training(pretrained, url, cases, epochs=1, validate_every=0), pretrained, WORLD)
    tuned = folder / "blobs-tumour-pre-trained-seed0"
    data = DataConfig(store=url, selection=str(tuned / "selection.parquet"), crop=(48, 48, 48), batch_size=2)
    settings = SegmentationConfig(modalities=TUMOUR.modalities, regions=TUMOUR.regions, overlap=0.0)
    values: dict[str, Any] = {"objective": settings, "data": data, "network": NETWORK.replace(in_channels=4)}
    config = make_training(tuned, url, cases, epochs=1, predict=True, init_from=str(pretrained), **values)
    train(config, tuned, WORLD)
    store = open_store(url)
    cohort = Cohort(TUMOUR, tuple(cases), store.cases().to_pandas(), store)
    return cohort, Finetuning(TUMOUR.name, PRETRAINED, 0, tuned, config), pretrained


def test_every_present_modality_is_dropped_once_with_each_filling(
    trained: tuple[Cohort, Finetuning, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohort, training, pretrained = trained
    asked: list[tuple[str, str]] = []
    predict = Segmentation.predict

    def counted(self: Segmentation, case: CaseInfo, reader: Any) -> dict[str, Any]:
        absent = [m for m, here in zip(SPEC.modalities, case.present, strict=True) if not here]
        asked.append((f"{case.case} without {'+'.join(absent)}", self.settings.missing))
        return predict(self, case, reader)

    monkeypatch.setattr(Segmentation, "predict", counted)
    frame, fresh = score_missing(cohort, [training], pretrained, tmp_path)
    assert fresh == 1
    assert sorted(asked) == sorted(
        [(f"case-6 without {m}", f) for m in ("flair+t1c", "t1+t1c", "t1c+t2") for f in FILLINGS]
        + [(f"case-7 without {m}", f) for m in SPEC.modalities for f in FILLINGS]
    )
    kinds = frame.groupby(["dropped", "filling"])["case"].nunique()
    assert kinds[NOTHING, "zero"] == kinds["t1", "template"] == 2
    assert kinds["t1c", "zero"] == 1
    assert set(frame["region"]) == {"ET", "TC", "WT"}
    assert frame["value"].between(0, 1).all()
    again, fresh = score_missing(cohort, [training], pretrained, tmp_path)
    assert fresh == 0
    pd.testing.assert_frame_equal(again[frame.columns], frame)


@pytest.mark.full
def test_workers_predict_what_this_process_predicts(trained: tuple[Cohort, Finetuning, Path], tmp_path: Path) -> None:
    cohort, training, pretrained = trained
    here, _ = score_missing(cohort, [training], pretrained, tmp_path / "here")
    with CaseWorkers(Settings(workers=2, state_dir=tmp_path), large=0) as work:
        told: list[str] = []
        work.show = told.append
        there, fresh = score_missing(cohort, [training], pretrained, tmp_path / "there", work)
    assert (fresh, told[-1]) == (1, "2 of 2 cases on 2 workers")
    pd.testing.assert_frame_equal(there, here)


def test_fillings_reach_the_network(trained: tuple[Cohort, Finetuning, Path]) -> None:
    from models.data import CaseDataset
    from models.filling import learned_templates
    from models.finished import read_training
    from models.predict import load_objective

    cohort, training, pretrained = trained
    objective = load_objective(training.folder)
    objective.use_templates(learned_templates(read_training(pretrained), TUMOUR.modalities, SPEC))
    dataset = CaseDataset(cohort.store.url, [cohort.selected[6]], objective.sampler(), "test")
    info, reader = dataset.info(0), dataset.reader(0)
    images = {}
    for filling in FILLINGS:
        objective.use_missing(filling)
        images[filling] = objective.channels.read(info, reader, (0, 0, 0), info.extent)
    t1c = TUMOUR.modalities.index("t1c")
    assert not images["zero"][t1c].any()
    window = objective.templates.window(t1c, info.origin, info.extent)
    np.testing.assert_array_equal(images["template"][t1c], window)


def _scores(values: dict[str, list[float]]) -> pd.DataFrame:
    """Dice of subjects by `row dropped filling`; two seeds and two regions that are alike."""
    lines = []
    for key, per_subject in values.items():
        row, dropped, filling = key.split()
        for subject, value in enumerate(per_subject):
            for seed in (0, 1):
                for region in ("ET", "WT"):
                    line = {"row": row, "dropped": dropped, "filling": filling, "seed": seed, "region": region}
                    lines.append({**line, "dataset": "d", "subject": f"s{subject}", "case": "c", "value": value})
    return pd.DataFrame(lines)


def test_the_table_compares_fillings_by_subject() -> None:
    zero, template = [0.1, 0.2, 0.6, 0.3], [0.3, 0.4, 0.8, 0.5]
    same = {"ours t2 zero": zero, "ours t2 template": zero, "ours nothing zero": zero, "ours nothing template": zero}
    frame = _scores({"ours t1 zero": zero, "ours t1 template": template, **same})
    table = missing_table("Toy", frame, replicates=200)
    first, second, third = table.lines
    assert (first.row, first.dropped, first.n) == ("ours", "t1", 4)
    assert first.zero.estimate == pytest.approx(0.3)
    assert first.template.estimate == pytest.approx(0.5)
    assert first.gain.estimate == pytest.approx(0.2)
    assert second.gain.estimate == 0
    assert (third.dropped, third.gain.estimate) == (NOTHING, None)
    text = table.to_markdown()
    assert text.startswith(
        "### Toy\n\n| row | without | n | mean Dice, zeros | mean Dice, template | template - zeros |"
    )
    assert "| ours | t1 | 4 | 0.300 [" in text
    assert table.to_csv().splitlines()[0] == "row,dropped,filling,n,dice,low,high"
    assert len(table.to_csv().splitlines()) == 1 + 9


def test_only_segmentations_of_several_modalities_can_lose_one(trained: tuple[Cohort, Finetuning, Path]) -> None:
    cohort, _, _ = trained
    from dataclasses import replace

    assert applies(cohort)
    assert not applies(replace(cohort, benchmark=TUMOUR.replace(modalities=("t1",))))
    assert not applies(replace(cohort, benchmark=BENCHMARKS["phantom-diagnosis"]))
    assert not applies(replace(cohort, selected=()))


def test_templates_that_were_never_learned_are_refused(
    trained: tuple[Cohort, Finetuning, Path], tmp_path: Path
) -> None:
    cohort, training, _ = trained
    with pytest.raises(ValueError, match=f"{training.folder} has no template bank"):
        score_missing(cohort, [training], training.folder, tmp_path)
