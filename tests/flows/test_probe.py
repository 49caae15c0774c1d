"""The probe flow on a real small store with random encoders: tables, report, resume, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from probe_phantoms import AD, AGE, CASES, write_encoder, write_workspace
from pydantic import ValidationError
from training_phantoms import DATASET

from flows.probe import ProbeParams, probe, read_comparison, run_name, score
from infra.server import ServerInfo
from models.records import SelectedCase
from models.selection import write_selection
from models.store import StoredDataset
from models.store_descriptors import Descriptors
from tasks.probe_tasks import PROBES
from tasks.probes import ProbeError

SHUFFLED = AD.replace(name="blobs-shuffled", shuffle_seed=5, control="negative")
ROWS = [
    {"name": "AnatCL", "trainings": ["one", "two"], "together": "ensemble"},
    {"name": "contrast", "trainings": ["simclr"]},
]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_workspace(tmp_path_factory.mktemp("probing"))
    seen = [
        SelectedCase(dataset=DATASET, row=0, case="case-0", subject="sub-0", digest="x", role="train"),
        SelectedCase(dataset=DATASET, row=1, case="case-1", subject="sub-1", digest="x", role="test"),
    ]
    for k, name in enumerate(("one", "two")):
        write_encoder(folder / "trainings" / name, k, seen=seen)
    write_encoder(folder / "trainings" / "simclr", 7, recipe="simclr_tiny")
    return folder


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Register probes of the blobs, shorten the grid, give the store descriptors; returns the published pages."""
    published: dict[str, str] = {}
    for one in (AGE, AD, SHUFFLED):
        monkeypatch.setitem(PROBES, one.name, one)
    monkeypatch.setattr("tasks.probes.GRID", (1.0,))
    monkeypatch.setattr("tasks.probes.INNER_FOLDS", 2)
    values = np.random.default_rng(0).uniform(2, 3, (CASES, 1, 3)).astype(np.float32)
    values[3] = np.nan
    made = Descriptors(values, ("cortical_thickness_mm",), ("a", "b", "c"), "desikan_killiany", "approximate")
    monkeypatch.setattr(StoredDataset, "descriptors", property(lambda self: made))
    monkeypatch.setattr("flows.results.publish_markdown", lambda key, text, *_: published.update({key: text}))
    return published


def params(workspace: Path, **changes: Any) -> ProbeParams:
    values = {"workspace": str(workspace), "rows": ROWS, "folds": 3, "random_seeds": 2}
    return ProbeParams(**{**values, "benchmarks": ["blobs-age", "openbhb-age"], **changes})


@pytest.fixture
def unwatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the task as a plain function: together with `probe.fn` no server is needed."""
    monkeypatch.setattr("flows.probe.score", score.fn)


def test_tables_report_and_resume(workspace: Path, unwatched: None, registered: dict[str, str]) -> None:
    first = probe.fn(params(workspace))
    assert first["no_data"] == ["openbhb-age"]
    # Encoders: an ensemble, one, two random ones; of ages: descriptors, none, ceiling; of sites: descriptors, none.
    assert first["scored"] == 2 * ((4 + 3) + (4 + 2)), "once more with who was seen"
    scores = pd.read_parquet(workspace / "probes" / "scores.parquet")
    assert set(scores["benchmark"]) == {"blobs-age", "site"}
    assert set(scores.groupby(["benchmark", "row", "seed"])["subject"].nunique()) == {23, 22}
    tables = workspace / "probes" / "tables"
    age = (tables / "blobs-age.md").read_text()
    for words in (
        "| row | n | seeds | MAE (years) | r |",
        "| AnatCL | 23 | 1 |",
        "| random encoder | 23 | 2 |",
        "| raw descriptors (approximate) | 23 | 1 |",
        "| y-Aware (not trained) | – | – | – | – |",
        "Subjects left out because a pre-training of this table has seen them: 1; see the table of leaks, whose .csv",
        "AnatCL: an ensemble of 2 encoders",
        "p: AnatCL against the row, t-test over folds with the same correction, Holm-corrected",
        "left out of the site report: C (1).",
    ):
        assert words in age, words
    leaks = (tables / "blobs-age.leaks.md").read_text()
    assert "| AnatCL | 23 |" in leaks
    assert "1 subjects were in one of the pre-trainings. The numbers without them count; with them" in leaks
    assert (tables / "blobs-age.leaks.csv").read_text().splitlines() == [
        "dataset,subject,why", f"{DATASET},sub-0,the same id",
    ]  # fmt: skip
    assert not (tables / "blobs-age.confusion.csv").exists()
    sites = pd.read_csv(tables / "site.confusion.csv")
    assert sites.query("row == 'random encoder' and seed == 'all'")["cases"].sum() == 2 * 22
    assert "SimCLR (not trained)" not in age
    assert "age+sex" not in age
    assert "| AnatCL | 22 | 1 |" in (tables / "site.md").read_text()
    assert "| no data |" in (tables / "openbhb-age.md").read_text()
    for suffix in ("csv", "tex", "0.png", "1.png"):
        assert (tables / f"blobs-age.{suffix}").stat().st_size > 100
    assert set(registered) == {f"benchmark-{name}" for name in first["tables"]}
    page = Path(first["report"]).read_text()
    for words in (
        "Not for clinical use",
        "embeddings of Phantom age",
        "Site effect",
        "SchizConnect SAPS",
        "simclr_tiny",
    ):
        assert words in page, words
    methods = (workspace / "probes" / "methods.md").read_text()
    for words in (
        "an ensemble, whose predictions are averaged; the first is described): A 3D ResNet [1]",
        "Row random encoder: the network of the first row with random weights, 2 initialisations.",
        "Phantom age: 23 subjects of blobs (age, ",
        "logistic regression (classes) or ridge regression (numbers)",
        "AnatCL was compared with every other row by t-tests over folds",
        "Inference for the Generalization Error",
    ):
        assert words in methods, words
    assert "Methods, for a paper" in page
    errors = pd.read_csv(tables / "blobs-age.csv").query("metric == 'mae'").set_index("row")["estimate"]
    assert errors["AnatCL"] < 0.9 * errors["no features"], "ages follow the size of the brain"

    second = probe.fn(params(workspace))
    assert (second["scored"], second["tables"]) == (0, first["tables"])


def test_nearest_neighbours_probe_the_same_features(
    workspace: Path, unwatched: None, registered: dict[str, str]
) -> None:
    asked: dict[str, Any] = {"benchmarks": ["blobs-age"], "site_report": False, "with_seen": False}
    probe.fn(params(workspace, **asked))
    assert "k-NN" not in (workspace / "probes" / "tables" / "blobs-age.md").read_text()
    found = probe.fn(params(workspace, knn=True, **asked))
    assert found["scored"] == 4, "a twin of each encoder"
    leaks = (workspace / "probes" / "tables" / "blobs-age.leaks.md").read_text()
    assert "1 subjects were in one of the pre-trainings and are left out. They were not scored" in leaks
    table = (workspace / "probes" / "tables" / "blobs-age.md").read_text()
    assert "| AnatCL, k-NN | 23 | 1 |" in table
    assert "(rows of k-NN: by the nearest training cases, their number chosen likewise) of frozen features" in table
    assert "| random encoder, k-NN | 23 | 2 |" in table
    with pytest.raises(ValidationError, match="'AnatCL, k-NN' is the name of a row that every table has"):
        params(workspace, knn=True, rows=[*ROWS, {"name": "AnatCL, k-NN", "trainings": ["one"]}])


def test_combat_is_shown_beside_and_changes_no_other_number(
    workspace: Path, unwatched: None, registered: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"benchmarks": ["blobs-age"], "with_seen": False, "random_seeds": 1, "rows": ROWS[1:]}
    folder = workspace / "probes"
    found = probe.fn(params(workspace, combat=True, **asked))
    kept = (folder / "scores.parquet").read_bytes()
    after = pd.read_parquet(folder / "combat.parquet")
    assert set(after["row"]) == {
        "contrast, ComBat", "random encoder, ComBat", "raw descriptors (approximate), ComBat",
    }  # fmt: skip
    age, site = ((folder / "tables" / f"{name}.combat.md").read_text() for name in ("blobs-age", "site"))
    assert "| contrast | 24 | MAE (years) |" in age
    assert "Sites: 3. Kept in the features: sex, where known" in age, "an age to be predicted is no covariate"
    assert "Left as they are: 1 of 24 test subjects, whose site" in age
    assert "| contrast | 23 | balanced accuracy |" in site
    assert "Kept in the features: age and sex" in site
    assert "the less of the sites is left; chance is 0.500" in site
    assert age in registered["benchmark-blobs-age"]
    assert "ComBat" not in (folder / "tables" / "blobs-age.md").read_text()
    assert "after ComBat" in Path(found["report"]).read_text()
    assert "harmonised over sites by ComBat [" in (folder / "methods.md").read_text()
    plain = probe.fn(params(workspace, **asked))
    assert (plain["scored"], plain["tables"]) == (0, found["tables"])
    assert (folder / "scores.parquet").read_bytes() == kept
    assert not (folder / "combat.parquet").exists(), "what was written before and is not asked for now goes"
    assert not (folder / "tables" / "blobs-age.combat.md").exists()
    monkeypatch.setattr("tasks.probe_scans._sites", lambda people: ["blobs/A"] * len(people))
    (alone,) = read_comparison(params(workspace, combat=True, site_report=False, **asked)).cohorts
    assert alone.notes[-1] == "No table after ComBat: it needs two sites, known here is blobs/A."
    with pytest.raises(ValidationError, match="'contrast, ComBat' is the name of a row that every table has"):
        params(workspace, combat=True, rows=[*ROWS, {"name": "contrast, ComBat", "trainings": ["one"]}])


@pytest.mark.full
def test_all_kinds_of_probes_on_a_server(workspace: Path, prefect_server: ServerInfo) -> None:
    rows = [{"name": "AnatCL", "trainings": ["one", "two"]}, ROWS[1]]
    names = ["blobs-ad", "blobs-shuffled"]
    found = probe(params(workspace, rows=rows, benchmarks=names, folds=4, site_report=False))
    # Seeds: two, one, two random; descriptors, age+sex, none, ceiling, with a shuffle for every seed.
    assert found["scored"] == 2 * ((5 + 4) + (5 + 2 * 4)), "once more with who was seen"
    ad = pd.read_csv(workspace / "probes" / "tables" / "blobs-ad.csv").query("metric == 'balanced_accuracy'")
    ad = ad.set_index("row")
    assert ad.loc["ceiling (true latents)", "estimate"] == 1
    assert ad.loc["no features", "estimate"] == 0.5
    assert (ad["kind"]["contrast"], ad["kind"]["AnatCL"]) == ("baseline", "ours")
    kept = {path: path.stat().st_mtime_ns for path in (workspace / "embeddings").iterdir()}
    again = probe(params(workspace, rows=rows, benchmarks=names, folds=3, site_report=False))
    assert again["scored"] == found["scored"], "other folds"
    assert {path: path.stat().st_mtime_ns for path in (workspace / "embeddings").iterdir()} == kept


@pytest.mark.full
def test_an_imported_encoder_is_pointed_out(workspace: Path, unwatched: None) -> None:
    folder = workspace / "trainings" / "imported"
    if not folder.exists():
        write_encoder(folder, 9, recipe="anatcl_tiny")
        done = (folder / "done.json").read_text()
        (folder / "done.json").write_text(
            done.replace("{", '{"origin": {"file": "x.pt", "layout": "anatcl-resnet3d"}, ', 1)
        )
    rows = [{"name": "released", "trainings": ["imported"]}]
    probe.fn(params(workspace, rows=rows, benchmarks=["blobs-age"], site_report=False))
    text = (workspace / "probes" / "tables" / "blobs-age.md").read_text()
    assert "imported was imported: which subjects it was trained on is not in its file" in text
    assert "nobody of openbhb, abide-i, abide-ii, corr, " in text


def test_what_cannot_be_probed_is_refused_before_any_work(workspace: Path, unwatched: None) -> None:
    with pytest.raises(KeyError, match="unknown probe 'nope'; known: phantom-anat-age"):
        probe.fn(params(workspace, benchmarks=["nope"]))
    everybody = [
        SelectedCase(dataset=DATASET, row=k, case=f"case-{k}", subject=f"sub-{k}", digest="x", role="train")
        for k in range(CASES)
    ]
    write_encoder(workspace / "trainings" / "all", 3)
    write_selection(workspace / "trainings" / "all" / "selection.parquet", everybody)
    with pytest.raises(ProbeError, match="all 24 subjects were seen by a pre-training"):
        probe.fn(params(workspace, rows=[{"name": "a", "trainings": ["all"]}]))


def test_the_form_says_bounds_in_words_and_refuses_the_rest() -> None:
    for name, field in ProbeParams.model_json_schema()["properties"].items():
        assert field["title"], name
        assert field["description"].endswith("."), name
    with pytest.raises(ValidationError, match="two rows are called like 'anatcl'; names must differ in letters"):
        ProbeParams(rows=[{"name": "anatcl", "trainings": ["a"]}, {"name": "AnatCL ", "trainings": ["b"]}])  # type: ignore[list-item]
    with pytest.raises(ValidationError, match="'Random encoder' is the name of a row that every table has"):
        ProbeParams(rows=[{"name": "Random encoder", "trainings": ["a"]}])  # type: ignore[list-item]
    with pytest.raises(ValidationError, match="greater than or equal to 3"):
        ProbeParams(rows=ROWS, folds=2)  # type: ignore[arg-type]
    assert run_name(ProbeParams(rows=ROWS[:1], benchmarks=["adni-ad"])) == "probe AnatCL on adni-ad"  # type: ignore[arg-type]


def test_the_example_of_the_documentation_is_valid() -> None:
    text = (Path(__file__).parents[2] / "docs" / "probes.md").read_text(encoding="utf-8")
    found = ProbeParams.model_validate(yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]))
    assert set(found.benchmarks) <= set(PROBES)
