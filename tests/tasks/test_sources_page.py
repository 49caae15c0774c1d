"""The configurations of docs/sources.md are configurations."""

import re
from pathlib import Path

import yaml
from pydantic import TypeAdapter

from models.reasons import Reason
from tasks.sources import CONVERTERS, READERS, SourceConfig

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "sources.md").read_text(encoding="utf-8")
CONFIG: TypeAdapter[SourceConfig] = TypeAdapter(SourceConfig)


def test_every_source_of_the_page_is_one():
    found = []
    for block in re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL):
        content = yaml.safe_load(block)
        for source in content.get("sources", []) if isinstance(content, dict) else content:
            if "kind" in source:
                found.append(CONFIG.validate_python(source).kind)
    assert set(found) == {*READERS, *CONVERTERS}


def test_reasons_of_the_catalog_that_the_page_names_exist():
    table = PAGE[PAGE.index("## What is left out") :]
    cells = re.findall(r"^\| ([^|]+) \|", table, flags=re.MULTILINE)
    named = {name.strip() for cell in cells for name in cell.split(",")}
    assert named - {"reason", "---"} <= {str(reason) for reason in Reason}
