"""Parameters that name a file below a workspace are single words: none leads out of it."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import BaseModel

from flows.evaluate_params import EvaluateParams
from flows.pretrain_params import PretrainParams
from flows.probe import ProbeParams
from flows.prompt import PromptParams

WORDS = {"pretrained", "init_from", "training", "trainings", "split"}
"""Fields whose value becomes a part of a path."""
LEAVING = ("..", "../x", "/etc/x", "a/b", "a/../../b", "x\n", "~/x")


def fields(schema: dict[str, Any]) -> dict[str, str]:
    """Return name -> pattern of every such field of a form, in nested forms too; an absent pattern is empty."""
    found = {}
    for owner in (schema, *schema.get("$defs", {}).values()):
        for name, field in owner.get("properties", {}).items():
            field = field.get("items", field)
            if name in WORDS and field.get("type") == "string":
                found[f"{owner.get('title', '')}.{name}"] = field.get("pattern", "")
    return found


@pytest.mark.parametrize("model", [PretrainParams, EvaluateParams, ProbeParams, PromptParams])
def test_names_cannot_leave_their_folder(model: type[BaseModel]) -> None:
    for name, pattern in fields(model.model_json_schema()).items():
        assert pattern, f"{name} becomes a part of a path and has no pattern"
        for value in LEAVING:
            # Pydantic's engine has no `$` before a final line break, Python's has.
            assert not re.search(pattern.replace("$", r"\Z"), value), f"{name} takes {value!r}"
