"""Who the subjects are: participants tables in many spellings become one phenotype table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import pandas as pd
from pandas.api.types import is_numeric_dtype

from models.records import digest_of
from tasks.table_files import pick, read_table

PHENOTYPES_FILE = "phenotypes.parquet"
COLUMNS = ("dataset", "subject", "session", "age", "sex", "site", "diagnosis")
"""Columns that every phenotype table has, in this order; others follow as in participants.tsv."""
KEYS = ["dataset", "subject", "session"]

SPELLINGS: dict[str, tuple[str, ...]] = {
    "subject": ("participant_id", "subject", "subject_id", "id"),
    "session": ("session", "session_id", "timepoint"),
    "age": ("age", "age_years", "age_at_scan"),
    "sex": ("sex", "gender"),
    "site": ("site", "site_id", "center", "centre"),
    "diagnosis": ("diagnosis", "dx", "dx_group", "group"),
}
SEXES = {"m": "M", "male": "M", "f": "F", "female": "F", "w": "F"}
"""Numeric codes differ between datasets (ABIDE: 1 is male), so they are kept as written."""


def read_participants(
    url: str, dataset: str, columns: Mapping[str, str] | None = None, subject_prefix: str = ""
) -> pd.DataFrame:
    """Return the phenotypes in a participants table (CSV, TSV or Parquet by its suffix); see COLUMNS.

    columns: our name -> column of the table, only these are read; without it known spellings are found. Absent
    columns are empty strings, an absent age is NaN. Raises ValueError without a column of subject ids.
    """
    table = read_table(url)
    found = choose(table, columns, url) if columns else table
    return normalise(found, dataset, url, subject_prefix)


def choose(table: pd.DataFrame, columns: Mapping[str, str], origin: str) -> pd.DataFrame:
    """Return some columns of a table under our names; raises ValueError when one is absent."""
    return pd.DataFrame({ours: pick(table, theirs, origin) for ours, theirs in columns.items()}, dtype=object)


def normalise(table: pd.DataFrame, dataset: str, origin: str = "the table", subject_prefix: str = "") -> pd.DataFrame:
    """Return a table of text in the common columns: age in years (BIDS writes `89+`), sex as M or F."""
    table = _rename(table).astype(object).fillna("").map(str.strip)
    if "subject" not in table:
        raise ValueError(
            f"{origin} has no column of subject ids; expected one of {', '.join(SPELLINGS['subject'])}, "
            f"found {', '.join(map(str, table.columns))[:500] or 'no column'}"
        )
    result = pd.DataFrame({"subject": [prefixed(name, subject_prefix) for name in table["subject"]]}, dtype=object)
    result.insert(0, "dataset", dataset)
    for name in ("session", "sex", "site", "diagnosis"):
        result[name] = table[name].to_numpy() if name in table else ""
    result["sex"] = [SEXES.get(value.lower(), value) for value in result["sex"]]
    ages = [text.rstrip("+") for text in table["age"]] if "age" in table else [""] * len(table)
    result["age"] = _numbers(ages)
    others = {name: _numeric_if_all(table[name].tolist()) for name in table.columns if name not in COLUMNS}
    result = pd.DataFrame({**{name: result[name] for name in COLUMNS}, **others})
    return result[result["subject"] != ""].reset_index(drop=True)


def prefixed(name: str, prefix: str) -> str:
    """Return an id with its prefix, put before it unless it is there."""
    return name if not name or name.startswith(prefix) else prefix + name


def combine(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Stack phenotype tables, sorted by dataset, subject and session; always with COLUMNS."""
    filled = [table for table in tables if len(table)]
    if not filled:
        return pd.DataFrame({name: pd.Series(dtype="float64" if name == "age" else "object") for name in COLUMNS})
    stacked = pd.concat(filled, ignore_index=True)
    for name in stacked.columns:
        if not is_numeric_dtype(stacked[name]):
            # One column may hold numbers in one dataset and words in another; Parquet wants one type.
            stacked[name] = pd.Series(
                [None if pd.isna(value) else word(value) for value in stacked[name]], dtype=object
            )
    return stacked.sort_values(KEYS, kind="stable").reset_index(drop=True)


def phenotypes_digest(table: pd.DataFrame) -> str:
    """Return the SHA-256 (hex) over the columns and rows of a table, in their order; the same from memory and file."""
    return digest_of(json.loads(table.to_json(orient="split", index=False)))


def word(value: object) -> str:
    """Return a value as text; a whole number has no decimals."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _rename(table: pd.DataFrame) -> pd.DataFrame:
    """Give the first column that matches a spelling its common name; a second match keeps its own name."""
    lower = {str(name).strip().lower(): name for name in reversed(table.columns)}
    names: dict[str, str] = {}
    for common, spellings in SPELLINGS.items():
        found = next((lower[spelling] for spelling in spellings if spelling in lower), None)
        if found is not None:
            names[found] = common
    # A column that bears a common name already, but was not chosen for it, would be there twice.
    taken = {name: f"{name}_as_written" for name in names.values() if name in table.columns and name not in names}
    return table.rename(columns={**taken, **names})


def _numbers(texts: Sequence[str]) -> pd.Series:
    """Return finite numbers, NaN for everything else."""
    numbers = pd.to_numeric(pd.Series(texts, dtype=object).replace("", None), errors="coerce").astype("float64")
    return numbers.where(numbers.abs() != float("inf"))


def _numeric_if_all(texts: Sequence[str]) -> pd.Series:
    """Return numbers when every filled cell is one, else words; absent cells are NaN or None."""
    numbers = _numbers(texts)
    filled = [bool(text) for text in texts]
    if any(filled) and all(numbers.notna()[filled]):
        return numbers
    return pd.Series([text or None for text in texts], dtype=object)
