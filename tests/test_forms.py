"""The forms of all deployments, as the UI builds them: words for every field, bounds in words, no unknown keys."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from flows.verify import VerifyParams

pytestmark = pytest.mark.full
ROOT = Path(__file__).resolve().parents[1]
DEPLOYMENTS = {one["name"]: one for one in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]}
PLACES = {"store", "stores", "catalog", "probe_store", "prompt_store"}
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


def schema_of(name: str) -> dict[str, Any]:
    from prefect.utilities.callables import parameter_schema

    module, function = DEPLOYMENTS[name]["entrypoint"].rsplit(".", 1)
    return parameter_schema(getattr(importlib.import_module(module), function).fn).model_dump()


def fields(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every field of every model of a form with its title and description; a model lends its own to a field."""
    models = schema["definitions"]
    for model, content in models.items():
        for name, field in content.get("properties", {}).items():
            refs = [one["$ref"] for one in (field, *field.get("anyOf", ())) if "$ref" in one]
            lender = models.get(refs[0].rsplit("/", 1)[-1], {}) if refs else {}
            yield f"{model}.{name}", {key: lender[key] for key in ("title", "description") if key in lender} | field


def bounds(field: dict[str, Any]) -> Iterator[float]:
    for kind in (field, *field.get("anyOf", ())):
        yield from (kind[bound] for bound in BOUNDS if bound in kind)


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_every_field_has_title_description_and_its_bounds_in_words(name: str) -> None:
    told = [(where, field) for where, field in fields(schema_of(name)) if "const" not in field]
    assert told
    without = [where for where, field in told if not field.get("title") or not field.get("description")]
    assert without == []
    silent = {
        where: bound
        for where, field in told
        for bound in bounds(field)
        if f"{bound:.10g}" not in field["description"].replace(",", "")
    }
    assert silent == {}


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_no_word_of_a_description_is_taken_for_html(name: str) -> None:
    """The form renders Markdown: of `<workspace>/splits` without backticks only `/splits` is seen."""
    told = {where: field.get("description", "") for where, field in fields(schema_of(name))}
    eaten = {where: text for where, text in told.items() if re.search(r"<\w", re.sub(r"`[^`]*`", "", text))}
    assert eaten == {}


def test_what_may_be_left_empty_says_so_in_words_and_a_source_begins_as_an_example() -> None:
    schema = schema_of("catalog")["definitions"]["CatalogParams"]["properties"]["sources"]["items"]
    assert schema["default"] == {"kind": "bids", "dataset": "ixi", "root": "./sources/ixi"}
    for name in DEPLOYMENTS:
        forms = {model: one for model, one in schema_of(name)["definitions"].items() if model.endswith("Params")}
        for model, form in forms.items():
            unions = {field: one["anyOf"] for field, one in form.get("properties", {}).items() if "anyOf" in one}
            unsaid = [
                field for field, kinds in unions.items() if any("$ref" not in k and "title" not in k for k in kinds)
            ]
            assert unsaid == [], model


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_no_form_takes_credentials_in_a_place(name: str) -> None:
    """The server keeps the parameters of a flow run before the flow can refuse them."""
    places = [
        (where, field.get("items", field))
        for where, field in fields(schema_of(name))
        if where.partition(".")[2] in PLACES and "$ref" not in field
    ]
    for where, place in places:
        assert re.search(place["pattern"], "s3://key:secret@bucket/x.zarr") is None, where
        assert re.search(place["pattern"], "s3://bucket/a@b.zarr"), where
        assert re.search(place["pattern"], "./state/store.zarr"), where
    assert places or name not in {"preprocess", "verify", "pretrain", "probe", "prompt", "benchmark"}


def test_credentials_in_a_place_are_not_repeated_by_us() -> None:
    with pytest.raises(ValidationError) as refused:
        VerifyParams(stores=["s3://key:secret@bucket/x.zarr"])
    (error,) = refused.value.errors(include_input=False, include_context=False)
    assert "a storage URL of scheme s3 has user info before its bucket" in error["msg"]
    assert "secret" not in error["msg"]


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_unknown_keys_are_refused(name: str) -> None:
    loose = [
        model
        for model, content in schema_of(name)["definitions"].items()
        if "properties" in content and content.get("additionalProperties") is not False
    ]
    assert loose == []


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_the_parameters_of_prefect_yaml_fit_the_form(name: str) -> None:
    module, function = DEPLOYMENTS[name]["entrypoint"].rsplit(".", 1)
    from inspect import signature

    flow = getattr(importlib.import_module(module), function)
    model = signature(flow.fn, eval_str=True).parameters["params"].annotation
    assert issubclass(model, BaseModel)
    given = DEPLOYMENTS[name].get("parameters", {}).get("params")
    if given is not None:
        assert model.model_validate(given)
    with pytest.raises(ValidationError, match=r"(?s)no_such_key\n +Extra inputs are not permitted"):
        model.model_validate({**(given or {}), "no_such_key": 1})
