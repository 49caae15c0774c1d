"""Where data are: every card is complete, and its catalog reads a miniature of the dataset as it is shipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from benchmark_layouts import LAYOUTS, SUBJECTS, write_miniature
from pydantic import TypeAdapter

from flows.catalog import CatalogParams
from models.records import LABEL, MODALITIES, SelectedCase
from tasks.benchmark_page import COMMAND, description, one_page
from tasks.benchmarks import BENCHMARKS, Benchmark
from tasks.catalog import build_catalog
from tasks.cohort import CohortError, scheme_of_cases, select_cases
from tasks.dataset_cards import cards_of, catalog_of, catalog_yaml, dataset_cards, use_of
from tasks.phenotype_layouts import with_layouts
from tasks.probe_tasks import PROBES
from tasks.prompt_tasks import PROMPT_TASKS
from tasks.registry import FLOWS, REGISTERED, find_registered
from tasks.sources import SourceConfig
from tasks.split_protocol import target_strata
from tasks.splits import make_split, roles, with_phenotypes

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"


def read(benchmark: Benchmark, root: Path, **changes: Any) -> tuple[pd.DataFrame, list[Any], list[Any]]:
    """Return what preprocessing would store of a miniature, all scans, and what is wrong with phenotypes."""
    sources = []
    for source in catalog_of(benchmark)["sources"]:
        below = Path(source["root"]).name if benchmark.name.startswith("phantom") else ""
        sources.append({**source, "root": str(root / below), **changes})
    result = build_catalog(TypeAdapter(list[SourceConfig]).validate_python(sources))
    cases: dict[str, dict[str, Any]] = {}
    for scan in result.scans:
        if scan.status == "ok":
            ids = {"dataset": scan.dataset, "subject": scan.subject, "session": scan.session, "case": scan.case}
            blank = {"row": len(cases), "digest": "d", "status": "stored", "has_label": False, "modalities": ()}
            case = cases.setdefault(scan.case, {**ids, **blank, "label_scheme": scan.label_scheme})
            case["has_label"] |= scan.modality == LABEL
            case["modalities"] += (scan.modality,) if scan.modality in MODALITIES else ()
    people = with_layouts(with_phenotypes(pd.DataFrame(list(cases.values())), result.phenotypes))
    return people, result.scans, list(result.issues)


def cohort(benchmark: Benchmark, people: pd.DataFrame) -> list[SelectedCase]:
    strata = ("dataset", "has_label", *target_strata(benchmark.datasets))
    split = make_split(people, 0, (0.5, 0.0, 0.5), strata)
    return select_cases(benchmark, people, roles(split))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_catalog_reads_the_data_as_they_are_shipped(name: str, tmp_path: Path) -> None:
    benchmark, (_, modalities) = BENCHMARKS[name], LAYOUTS[name]
    write_miniature(name, tmp_path)
    people, scans, issues = read(benchmark, tmp_path)
    assert [(scan.reason, scan.detail) for scan in scans if scan.status != "ok"] == []
    assert not issues
    assert {scan.modality for scan in scans} == modalities
    chosen = cohort(benchmark, people)
    assert {case.role for case in chosen} == {"train", "test"}
    if benchmark.kind == "segmentation":
        assert set(people["label_scheme"]) == {benchmark.scheme}
        assert len(chosen) == SUBJECTS  # of the phantoms half the subjects have the lesion, in two places each
    else:
        assert {case.target for case in chosen} == set(benchmark.classes)
        assert len(chosen) == SUBJECTS


def test_every_layout_of_fine_tuning_has_a_miniature() -> None:
    assert set(LAYOUTS) | {"phantom-tumour", "phantom-diagnosis", "phantom-control", "phantom-shuffled"} == set(
        BENCHMARKS
    )


def test_the_grade_and_site_of_brats2018_are_in_its_paths(tmp_path: Path) -> None:
    write_miniature("brats2018", tmp_path)
    people, _, _ = read(BENCHMARKS["brats2018"], tmp_path)
    assert people.groupby("site")["grade"].agg(sorted).to_dict() == {
        "2013": ["HGG", "LGG"], "CBICA": ["HGG", "LGG"], "TCIA03": ["HGG", "LGG"],
    }  # fmt: skip


def test_the_regions_of_brats2023_ped_follow_the_scheme_of_its_release(tmp_path: Path) -> None:
    benchmark = BENCHMARKS["brats2023-ped"]
    write_miniature("brats2023-ped", tmp_path)
    people, _, _ = read(benchmark, tmp_path, label_scheme="brats-ped2024")
    chosen = scheme_of_cases(benchmark, people)
    assert {region.name: region.labels for region in chosen.regions}["ET"] == (1,)
    assert len(cohort(chosen, people)) == SUBJECTS
    assert scheme_of_cases(benchmark, people.assign(label_scheme="brats2023")) == benchmark
    assert scheme_of_cases(benchmark, people.assign(status="quarantined")) == benchmark
    mixed = people.assign(label_scheme=["brats2023", "brats-ped2024"] * (SUBJECTS // 2))
    with pytest.raises(CohortError, match="follow brats2023 and brats-ped2024, whose regions differ; keep one release"):
        scheme_of_cases(benchmark, mixed)


@pytest.mark.parametrize("name", REGISTERED)
def test_every_benchmark_says_where_its_data_are(name: str) -> None:
    benchmark = find_registered(name)
    cards = cards_of(benchmark)
    assert [card.name for card in cards] == list(benchmark.datasets)
    assert all(use_of(benchmark) in card.sources for card in cards)
    assert all(card.home.startswith("https://") or card.access == "made here" for card in cards)
    assert (name.startswith("phantom-")) == all(card.access == "made here" for card in cards)
    params = CatalogParams.model_validate(yaml.safe_load(catalog_yaml(benchmark)))
    assert {source.dataset for source in params.sources} == set(benchmark.datasets)
    text = description(benchmark)
    assert all(f"{row.value:g} | {row.basis} | {row.source}" in text for row in benchmark.published)
    assert f"`brainloom {FLOWS[benchmark.protocol]}`" in text


def test_names_are_distinct_and_unknown_ones_are_refused() -> None:
    assert len(REGISTERED) == len(BENCHMARKS) + len(PROBES) + len(PROMPT_TASKS)
    assert set(dataset_cards()) == {name for one in REGISTERED.values() for name in one.datasets}
    with pytest.raises(KeyError, match=r"unknown benchmark 'nope'; known: phantom-tumour, .*, cinp-srpbs"):
        find_registered("nope")


def test_the_page_of_the_documentation_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == one_page(), f"run `{COMMAND}`"
