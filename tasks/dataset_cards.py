"""Where the data of the benchmarks are: home, access, licence, and a catalog that reads them as they are shipped.

The cards are `dataset_cards.yaml`. They stand beside the benchmarks and not in them: where data are to be had
changes no result, so it is part of no digest.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, TypeAdapter

from models.records import GREY, Record
from tasks.benchmarks import Basis, Benchmark
from tasks.sources import SourceConfig

FILE = Path(__file__).parent / "dataset_cards.yaml"
Use = Literal["images", "maps", "networks"]
"""What a benchmark needs of a dataset: images, grey-matter maps, or T1s with connectomes."""
WIDTH = 110
"""Of a line of YAML, where it can be broken."""


class DatasetCard(Record):
    """One dataset: who may have it, from where, and how to read it."""

    name: str
    """As in the catalog and the store."""
    title: str
    access: Literal["open", "registration", "data use agreement", "made here"]
    licence: str = "unknown"
    home: str
    """Where to get the data: a URL, or the command that writes them."""
    basis: Basis
    """How sure home, access, licence and layout are."""
    note: str = ""
    sources: dict[Use, tuple[SourceConfig, ...]] = Field(min_length=1)
    """By what a benchmark needs: the sources of a catalog that reads the data as they are shipped."""


@cache
def dataset_cards() -> dict[str, DatasetCard]:
    """Return every card by the name of its dataset."""
    content = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return {card.name: card for card in TypeAdapter(list[DatasetCard]).validate_python(content)}


def cards_of(benchmark: Benchmark) -> list[DatasetCard]:
    """Return the cards of a benchmark's datasets; those that the registry does not know have none."""
    known = dataset_cards()
    return [known[name] for name in benchmark.datasets if name in known]


def whereabouts(benchmark: Benchmark) -> list[str]:
    """Return one sentence a dataset: where it is to be had, who may have it, and how sure that is.

    Addresses stand without `https://`: a report links to nothing outside.
    """
    return [
        f"Where the data are: {card.title}, {card.home.removeprefix('https://')} (access: {card.access}; licence: "
        f"{card.licence}; {card.basis}). `brainloom benchmarks show {benchmark.name}` prints a catalog that reads them."
        for card in cards_of(benchmark)
    ]


def use_of(benchmark: Benchmark) -> Use:
    """Return what a benchmark needs of its datasets."""
    if benchmark.protocol == "prompt":
        return "networks"
    return "maps" if benchmark.modalities == (GREY,) else "images"


def catalog_of(benchmark: Benchmark, workspace: str = "./state/work") -> dict[str, Any]:
    """Return the parameters of a catalog that reads the data of a benchmark, without defaults; see tasks.sources."""
    sources = [source for card in cards_of(benchmark) for source in card.sources[use_of(benchmark)]]
    shown = [{"kind": source.kind, **source.model_dump(mode="json", exclude_unset=True)} for source in sources]
    return {"workspace": workspace, "sources": shown}


def catalog_yaml(benchmark: Benchmark) -> str:
    """Return a ready catalog.yaml for a benchmark, with what is to be known about its datasets as comments."""
    comments = [f"# {card.title}: {card.home}\n" for card in cards_of(benchmark)]
    return "".join(comments) + yaml.safe_dump(catalog_of(benchmark), sort_keys=False, width=WIDTH, allow_unicode=True)
