"""How a dataset names its phenotypes: columns and values of its own tables become ours.

Layouts are YAML files in `tasks/layouts`. Each says its basis, because nobody could check those of closed data here; a
file of the same dataset given by the user takes its place.
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
    """Names of the dataset's own column, upper and lower case alike: the first that says anything is taken."""
    values: dict[str, str] = Field(default_factory=dict)
    """Words or codes of the dataset -> ours, upper and lower case alike; our words stay, others are missing. Empty: as
    written."""

    def word_of(self, text: str) -> str | None:
        """Return our word for a word or code of the dataset, or None for an unknown one."""
        known = {ours.lower(): ours for ours in self.values.values()}
        known |= {theirs.lower(): ours for theirs, ours in self.values.items()}
        return known.get(text.strip().lower())


class Layout(Record):
    """The columns of one dataset."""

    dataset: str
    basis: Basis
    missing: frozenset[str] = frozenset()
    """Codes and words that say, in any column, that nothing is known."""
    columns: dict[str, ColumnRule] = Field(min_length=1)


class LayoutError(ValueError):
    """A layout file that cannot be used."""


@cache
def layouts() -> dict[str, Layout]:
    """Return the layouts of the package by dataset."""
    found = [read_layout(path) for path in sorted(FOLDER.glob("*.yaml"))]
    return {layout.dataset: layout for layout in found}


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

    A dataset without a layout, and a column of which no source says anything, stay as they are.
    """
    known = layouts() | {layout.dataset: layout for layout in own}
    result = people.copy()
    for dataset in sorted(set(people["dataset"]) & set(known)):
        rows = people["dataset"] == dataset
        for name, rule in known[dataset].columns.items():
            source = _source(people.loc[rows], rule)
            if source is not None:
                values = _mapped(people.loc[rows, source], rule, known[dataset].missing)
                result[name] = result[name].astype(object) if name in result else None
                result.loc[rows, name] = values
    return result


def _source(people: pd.DataFrame, rule: ColumnRule) -> str | None:
    """Return the first column of a rule that says anything about some people of one dataset, or None."""
    lower = {str(name).lower(): str(name) for name in reversed(people.columns)}
    there = (lower[one.lower()] for one in rule.sources if one.lower() in lower)
    return next((name for name in there if (people[name].notna() & (people[name] != "")).any()), None)


def _mapped(values: pd.Series, rule: ColumnRule, missing: frozenset[str]) -> pd.Series:
    texts = [word(value).strip() for value in values]
    ours = [rule.word_of(text) for text in texts] if rule.values else list(values)
    known = [None if text in missing else value for text, value in zip(texts, ours, strict=True)]
    return pd.Series(known, index=values.index, dtype=object)
