"""Corrected phenotypes and grown splits leave their old versions, and trainings name the ones they were made from."""

import json
import logging
from pathlib import Path

import pandas as pd
import pytest
from objective_cases import make_config

from infra import storage
from models.config import BrainMVPConfig, MadeFrom
from models.records import SelectedCase
from tasks.catalog import CatalogResult, read_phenotypes, summarise, write_catalog
from tasks.phenotypes import combine, normalise, phenotypes_digest
from tasks.pretraining import prepare_training
from tasks.splits import ensure_split, made_from, read_split
from tasks.versions import keep_version, version_url


def people(**columns):
    return combine([normalise(pd.DataFrame(columns), "ixi")])


def cohort(count):
    return pd.DataFrame({"dataset": "ixi", "subject": [f"s{k:03d}" for k in range(count)]})


def catalog(ws, table):
    return write_catalog(CatalogResult([], table, summarise([], table)), ws)


def versions(folder):
    return sorted(storage.listdir(storage.join(str(folder), "versions")))


def test_a_corrected_diagnosis_keeps_the_old_table(root_url):
    first = people(subject=["1", "2"], diagnosis=["AD", "HC"], age=["70", ""])
    second = people(subject=["1", "2"], diagnosis=["AD", "AD"], age=["70", ""])
    assert catalog(root_url, first)
    assert catalog(root_url, second)
    digests = [phenotypes_digest(table) for table in (first, second)]
    assert versions(root_url) == sorted(f"phenotypes-{digest[:12]}.parquet" for digest in digests)
    url = storage.join(root_url, "phenotypes.parquet")
    for digest, table in zip(digests, (first, second), strict=True):
        pd.testing.assert_frame_equal(read_phenotypes(version_url(url, digest)), table, check_dtype=False)
    assert read_phenotypes(root_url)["diagnosis"].tolist() == ["AD", "AD"]
    assert not catalog(root_url, second)
    assert catalog(root_url, first)  # back again: no third version
    assert len(versions(root_url)) == 2


@pytest.mark.parametrize(
    "table",
    [
        people(subject=["1"]),
        people(subject=["1", "2"], age=["70.25", ""], score=["3", ""], note=["", "x"]),
        people(subject=["1"], weight=["70.123456789012345"]),
        combine([]),
    ],
)
def test_the_digest_is_the_same_from_memory_and_from_the_file(tmp_path, table):
    catalog(str(tmp_path), table)
    told = json.loads((tmp_path / "catalog.json").read_text())["phenotypes_digest"]
    assert told == phenotypes_digest(table) == phenotypes_digest(read_phenotypes(str(tmp_path)))
    assert told == phenotypes_digest(pd.read_parquet(tmp_path / "phenotypes.parquet"))


def test_a_split_that_grows_keeps_what_it_was(tmp_path):
    path = tmp_path / "splits" / "default.parquet"
    first, old = ensure_split(path, cohort(40), seed=0)
    _, new = ensure_split(path, cohort(50), seed=0)
    assert versions(path.parent) == sorted(f"default-{digest[:12]}.parquet" for digest in (old, new))
    again, digest = read_split(Path(version_url(str(path), old)))
    assert digest == old
    pd.testing.assert_frame_equal(again, first)


def test_made_from_names_and_keeps_what_is_there_now_edited_by_hand_or_not(tmp_path):
    split = tmp_path / "splits" / "mine.parquet"
    _, digest = ensure_split(split, cohort(40), seed=0)
    assert made_from(tmp_path, "mine", digest) == MadeFrom(split="mine", split_digest=digest)
    people(subject=["1"], diagnosis=["AD"]).to_parquet(tmp_path / "phenotypes.parquet")
    used = made_from(tmp_path, "mine", digest)
    assert versions(tmp_path) == [f"phenotypes-{used.phenotypes_digest[:12]}.parquet"]
    people(subject=["1"], diagnosis=["HC"]).to_parquet(tmp_path / "phenotypes.parquet")
    assert made_from(tmp_path, "mine", digest) != used
    assert len(versions(tmp_path)) == 2


def test_a_version_is_written_once(tmp_path):
    table = tmp_path / "a.parquet"
    table.write_bytes(b"one")
    kept = keep_version(str(table), "0123456789abcdef")
    assert kept == str(tmp_path / "versions" / "a-0123456789ab.parquet")
    table.write_bytes(b"two")
    keep_version(str(table), "0123456789abcdef")
    assert Path(kept).read_bytes() == b"one"
    assert version_url("a.parquet", "ab") == "./versions/a-ab.parquet"


def test_a_training_names_its_tables_and_a_resume_keeps_the_names(tmp_path, caplog):
    case = SelectedCase(dataset="ixi", row=0, case="1", subject="1", digest="d", role="train")
    before, after = (MadeFrom(split="default", split_digest=text, phenotypes_digest=text) for text in "ab")
    config = make_config(BrainMVPConfig())
    prepare_training(tmp_path / "t", config.replace(made_from=before), [case])
    told = json.loads((tmp_path / "t" / "run.json").read_text())["made_from"]
    assert told == {"split": "default", "split_digest": "a", "phenotypes_digest": "a"}
    with caplog.at_level(logging.WARNING):
        again = prepare_training(
            tmp_path / "t", config.replace(made_from=after), [case, case.replace(row=1, role="val")]
        )
    assert "keeps its frozen selection" in caplog.text
    assert again.config.made_from == before
    assert json.loads((tmp_path / "t" / "run.json").read_text())["made_from"] == told
    assert config.replace(made_from=after).content_digest() == config.content_digest()
