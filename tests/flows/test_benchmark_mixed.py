"""Weights of all three methods on all three protocols in one comparison, trained, embedded and prompted for real."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import probe_phantoms
import prompt_phantoms
import pytest
from connectome_stores import DATASET
from released_files import TINY_UNIFORMER_TABLE, random_state, write_released, write_untrained

from flows.benchmark import benchmark
from flows.benchmark_params import BenchmarkParams
from infra.server import ServerInfo
from tasks.benchmark_summary import ALL
from tasks.benchmarks import BENCHMARKS, Benchmark
from tasks.probe_tasks import PROBES
from tasks.prompt_tasks import PROMPT_TASKS
from tasks.weights_import import import_weights

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]
TUNED = BENCHMARKS["phantom-diagnosis"].replace(
    name="toy-tuned", datasets=(DATASET,), classes=("control", "hypoconnected")
)
SEX = TUNED.replace(name="toy-sex", title="Phantom sex, tuned", target="sex", classes=("F", "M"))
CAUSES = ("age", "head_scale", "grey_loss", "ventricle_log", "medial_temporal_loss")
"""Columns of latents that the ceiling of a fine-tuned benchmark wants."""
RUNS = [
    {"training": "cinp", "name": "CINP_α & co", "repeats": ["cinp-seed1"]},
    {"training": "released", "name": "BrainMVP, released"},
    {"training": "anatcl", "name": "AnatCL"},
]


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    own: dict[str, Benchmark]
    for own, one in (
        (BENCHMARKS, TUNED),
        (BENCHMARKS, SEX),
        (PROBES, probe_phantoms.AD),
        (PROMPT_TASKS, prompt_phantoms.TOY),
    ):
        monkeypatch.setitem(own, one.name, one)
        monkeypatch.setitem(ALL, one.name, one)
    for name in ("tasks.probes", "tasks.connectome_baselines"):
        monkeypatch.setattr(f"{name}.GRID", (1.0,))
        monkeypatch.setattr(f"{name}.INNER_FOLDS", 2)


def write_workspace(folder: Path) -> None:
    """Write a store of images with connectomes, one of grey matter beside it, and trainings of the three methods."""
    probe_phantoms.write_workspace(folder / "maps")
    selection = prompt_phantoms.write_workspace(folder)
    people = [pd.read_parquet(one / "phenotypes.parquet") for one in (folder, folder / "maps")]
    pd.concat(people, ignore_index=True).to_parquet(folder / "phenotypes.parquet")
    latents = folder / "sources" / DATASET / "latents.parquet"
    pd.read_parquet(latents).assign(**dict.fromkeys(CAUSES, 0.0)).to_parquet(latents)
    trainings = folder / "trainings"
    like = write_untrained(folder / "like")
    file = write_released(folder / "BrainMVP_uniformer.pt", random_state(TINY_UNIFORMER_TABLE))
    import_weights(file, trainings / "released", like)
    probe_phantoms.write_encoder(trainings / "anatcl", 1)
    for seed, name in enumerate(("cinp", "cinp-seed1")):
        prompt_phantoms.write_pair(trainings / name, seed, selection)


def asked(workspace: Path, **changes: Any) -> BenchmarkParams:
    names = [TUNED.name, SEX.name, probe_phantoms.AD.name, prompt_phantoms.TOY.name]
    values = {
        "workspace": str(workspace),
        "runs": RUNS,
        "benchmarks": names,
        "probe_store": f"{workspace}/maps/store.zarr",
    }
    return BenchmarkParams.model_validate({**values, "seeds": 1, "finetune_epochs": 1, "folds": 3, **changes})


def test_three_methods_on_three_protocols(tmp_path: Path, prefect_server: ServerInfo, registered: None) -> None:
    write_workspace(tmp_path)
    first = benchmark(asked(tmp_path))
    rows = ["scratch", "scratch (uniformer)", "scratch (resnet3d)"]
    assert first["trained"] == 2 * (len(RUNS) + 1 + len(rows)), "one of the runs starts twice"
    assert len(first["tables"]) == 5, "that of the sites among the probes, too"

    text = Path(first["summary"]).read_text()
    for words in (
        "## Fine-tuning", "## Probes of frozen encoders", "## Prompting with connectomes",
        *(f"\n| {row} | " for row in rows), "| CINP_α & co: mean, 100 % |", "\n| random encoder |",
        "- BrainMVP, released is left out: training released and the store differ in frame",
        "- AnatCL is left out: training anatcl (recipe 'anatcl_tiny') has no encoder of connectomes",
    ):  # fmt: skip
        assert words in text, words
    assert str(tmp_path) not in text

    tables = tmp_path / "tables"
    tuned = (tables / "toy-tuned.md").read_text()
    assert "| CINP_α & co | 7 | 2 |" in tuned
    assert "- BrainMVP, released was imported from the file BrainMVP_uniformer.pt: which subjects" in tuned
    assert "| CINP_α & co | 2 | 1 | " in (tables / "toy-tuned.seeds.md").read_text()
    assert "CINP\\_$\\alpha$ \\& co" in (tables / "toy-tuned.tex").read_text()
    board = pd.read_csv(tables / "leaderboard.csv")
    assert {*(run["name"] for run in RUNS), *rows, "majority"} <= set(board["row"])
    seeds = pd.read_parquet(tmp_path / "scores.parquet").groupby("row")["seed"].unique()
    assert sorted(seeds["CINP_α & co"]) == [0, 100]

    page = (tmp_path / "report" / "index.html").read_text()
    for words in ("how far pre-trainings and fine-tunings differ", "imported from the file", 'id="leaderboard"'):
        assert words in page, words
    assert "It was repeated from seed 1, and every one of the 2" in (tmp_path / "report" / "methods.md").read_text()

    again = benchmark(asked(tmp_path))
    assert (again["trained"], again["scored"]) == (0, 0)
    assert Path(again["summary"]).read_text() == text
