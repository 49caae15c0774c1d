"""How settings come from the environment: secrets in files, and no misspelt name that would do nothing in silence."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

PREFIX = "BRAINLOOM_"
OTHERS = frozenset({"BRAINLOOM_DEBUG", "BRAINLOOM_EXPECT_NO_SKIPS", "BRAINLOOM_SCREENSHOTS"})
"""Variables of ours that are no settings: for the command line's errors and for the tests."""


def secret_fields(settings: type[BaseSettings]) -> list[str]:
    """Return the names of the fields that hold a secret."""
    return [name for name, field in settings.model_fields.items() if SecretStr in get_args(field.annotation)]


def refuse_unknown(settings: type[BaseSettings], environment: Mapping[str, str]) -> None:
    """Raise ValueError naming a variable with our prefix that no setting reads, with the nearest one that exists."""
    known = {f"{PREFIX}{name.upper()}" for name in settings.model_fields} | OTHERS
    known |= {f"{PREFIX}{name.upper()}_FILE" for name in secret_fields(settings)}
    for name in sorted(environment):
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            near = difflib.get_close_matches(name.upper(), known, n=1)
            guess = f"did you mean {near[0]}?" if near else "docs/clusters.md lists those there are"
            raise ValueError(f"the environment variable {name} is no setting of brainloom; {guess} Correct or unset it")


class SecretFiles(PydanticBaseSettingsSource):
    """Reads the secret fields from the files that `BRAINLOOM_<FIELD>_FILE` name: one value each, spaces at its ends
    dropped. No error repeats a content."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Return a field's value; raises ValueError for a file that is absent or empty, or beside the variable."""
        variable = f"{PREFIX}{field_name.upper()}"
        path = os.environ.get(f"{variable}_FILE", "")
        if not path:
            return None, field_name, False
        if os.environ.get(variable):
            raise ValueError(f"{variable} and {variable}_FILE are both set; keep one of them")
        try:
            value = Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not text"
            raise ValueError(f"{variable}_FILE names {path}, which cannot be read: {why}") from None
        if not value:
            raise ValueError(f"{variable}_FILE names {path}, which is empty; write the secret into it")
        return value, field_name, False

    def __call__(self) -> dict[str, Any]:
        """Return the secrets that stand in files."""
        values = {}
        for name in secret_fields(self.settings_cls):
            value, key, _ = self.get_field_value(self.settings_cls.model_fields[name], name)
            if value is not None:
                values[key] = value
        return values
