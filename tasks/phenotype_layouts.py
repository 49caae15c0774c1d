"""How a dataset names its phenotypes: columns and values of its own tables become ours.

Public layouts are code below. Those of closed data are YAML files in `tasks/layouts`: nobody could check them here, so
each says its basis, and a file of the same dataset given by the user takes its place.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pandas as pd
import yaml
from pydantic import ConfigDict, Field, ValidationError

from models.records import Record
from tasks.benchmarks import Basis
from tasks.phenotypes import word

FOLDER = Path(__file__).parent / "layouts"


class ColumnRule(Record):
    """Where one of our columns comes from."""

    model_config = ConfigDict(populate_by_name=True)

    sources: tuple[str, ...] = Field(alias="from", min_length=1)
    """Names of the dataset's own column, upper and lower case alike: the first that is there is taken."""
    values: dict[str, str] = Field(default_factory=dict)
    """Words or codes of the dataset -> ours, upper and lower case alike; others are missing. Empty: as written."""


class Layout(Record):
    """The columns of one dataset."""

    dataset: str
    basis: Basis
    columns: dict[str, ColumnRule] = Field(min_length=1)


# Preprocessed Connectomes Project, phenotypic file of ABIDE I; public legend.
ABIDE_I = Layout(
    dataset="abide-i",
    basis="confirmed",
    columns={
        "dsm_iv": ColumnRule(
            sources=("DSM_IV_TR",), values={"0": "HC", "1": "autism", "2": "Asperger", "3": "PDD-NOS"}
        ),
        "sex": ColumnRule(sources=("SEX",), values={"1": "M", "2": "F", "M": "M", "F": "F"}),
        "age": ColumnRule(sources=("AGE_AT_SCAN", "age")),
        "site": ColumnRule(sources=("SITE_ID", "site")),
    },
)


class LayoutError(ValueError):
    """A layout file that cannot be used."""


@cache
def layouts() -> dict[str, Layout]:
    """Return the layouts of the package by dataset: those in code and those in YAML."""
    found = [read_layout(path) for path in sorted(FOLDER.glob("*.yaml"))]
    return {layout.dataset: layout for layout in (ABIDE_I, *found)}


def read_layout(path: Path) -> Layout:
    """Return the layout in a YAML file; raises LayoutError naming the file and the rule."""
    if not path.is_file():
        raise LayoutError(f"{path} is not a file; correct `layouts`")
    try:
        return Layout.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValidationError, UnicodeDecodeError) as error:
        raise LayoutError(f"{path} is no layout (dataset, basis, columns: name -> from, values): {error}") from None


def with_layouts(people: pd.DataFrame, own: Iterable[Layout] = ()) -> pd.DataFrame:
    """Return the people with our columns filled from those of their dataset; `own` layouts win over the package's.

    A dataset without a layout, and a column of which no source is there, stay as they are.
    """
    known = layouts() | {layout.dataset: layout for layout in own}
    result = people.copy()
    for dataset in sorted(set(people["dataset"]) & set(known)):
        rows = people["dataset"] == dataset
        lower = {str(name).lower(): name for name in reversed(people.columns)}
        for name, rule in known[dataset].columns.items():
            source = next((lower[one.lower()] for one in rule.sources if one.lower() in lower), None)
            if source is not None:
                values = _mapped(people.loc[rows, source], rule)
                result[name] = result[name].astype(object) if name in result else None
                result.loc[rows, name] = values
    return result


def _mapped(values: pd.Series, rule: ColumnRule) -> pd.Series:
    if not rule.values:
        return values.astype(object)
    words = {key.lower(): ours for key, ours in rule.values.items()}
    return pd.Series([words.get(word(value).strip().lower()) for value in values], index=values.index, dtype=object)
