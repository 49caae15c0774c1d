"""Who the subjects are: participants tables in many spellings become one phenotype table."""

from __future__ import annotations

from io import BytesIO

import pandas as pd

from infra import storage

COLUMNS = ("dataset", "subject", "session", "age", "sex", "site", "diagnosis")
"""Columns that every phenotype table has, in this order; others follow as in participants.tsv."""

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
MISSING = ["n/a", "N/A", "NA", "nan", "NaN", ""]


def read_participants(url: str, dataset: str) -> pd.DataFrame:
    """Return the phenotypes in a participants table (TSV, or CSV by its suffix); see COLUMNS.

    Absent columns are empty strings, an absent age is NaN. Raises ValueError without a column of subject ids.
    """
    raw = storage.read_bytes(url)
    separator = "," if url.endswith(".csv") else "\t"
    table = pd.read_csv(BytesIO(raw), sep=separator, dtype=str, na_values=MISSING, keep_default_na=False)
    return normalise(table, dataset, url)


def normalise(table: pd.DataFrame, dataset: str, origin: str = "the table") -> pd.DataFrame:
    """Return a table of strings in the common columns: age in years (BIDS writes `89+`), sex as M or F."""
    table = _rename(table)
    if "subject" not in table:
        raise ValueError(
            f"{origin} has no column of subject ids; expected one of {', '.join(SPELLINGS['subject'])}, "
            f"found {', '.join(map(str, table.columns)) or 'no column'}"
        )
    result = pd.DataFrame({"subject": table["subject"].fillna("").str.strip()})
    result.insert(0, "dataset", dataset)
    for name in ("session", "sex", "site", "diagnosis"):
        result[name] = table[name].fillna("").str.strip() if name in table else ""
    result["sex"] = [SEXES.get(value.lower(), value) for value in result["sex"]]
    ages = table["age"].str.strip().str.rstrip("+") if "age" in table else pd.Series(index=table.index, dtype=object)
    result["age"] = pd.to_numeric(ages, errors="coerce").astype("float64")
    others = table[[name for name in table.columns if name not in COLUMNS]]
    result = pd.concat([result[list(COLUMNS)], others.apply(_numeric_if_all)], axis=1)
    return result[result["subject"] != ""].reset_index(drop=True)


def combine(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """Stack phenotype tables, sorted by dataset, subject and session; always with COLUMNS."""
    filled = [table for table in tables if len(table)]
    if not filled:
        return pd.DataFrame({name: pd.Series(dtype="float64" if name == "age" else "object") for name in COLUMNS})
    stacked = pd.concat(filled, ignore_index=True)
    for name in stacked.columns:
        if stacked[name].dtype == object:
            # One column may hold numbers in one dataset and words in another; Parquet wants one type.
            stacked[name] = [None if pd.isna(value) else str(value) for value in stacked[name]]
    return stacked.sort_values(["dataset", "subject", "session"], kind="stable").reset_index(drop=True)


def _rename(table: pd.DataFrame) -> pd.DataFrame:
    """Give the first column that matches a spelling its common name; a second match keeps its own name."""
    lower = {str(name).strip().lower(): name for name in reversed(table.columns)}
    names: dict[str, str] = {}
    for common, spellings in SPELLINGS.items():
        found = next((lower[spelling] for spelling in spellings if spelling in lower), None)
        if found is not None:
            names[found] = common
    return table.rename(columns=names)


def _numeric_if_all(column: pd.Series) -> pd.Series:
    numbers = pd.to_numeric(column, errors="coerce")
    return numbers if numbers.notna().sum() == column.notna().sum() and column.notna().any() else column
