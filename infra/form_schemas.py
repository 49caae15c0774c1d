"""The forms of deployments as this version makes them: the JSON schemas of their flows' parameters.

Computed in a process of its own, with a Prefect that knows neither the caller's profile nor any server:
`python -m infra.form_schemas <entrypoint> ...` prints them as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from infra.settings import private_environment

TIMEOUT_S = 300
"""All flows and the libraries below them are imported."""


class FormError(ValueError):
    """A flow of a deployment cannot be imported here."""


def form_schemas(entrypoints: Sequence[str]) -> dict[str, Any]:
    """Return the schemas by entrypoint; raises FormError with the last line of what went wrong."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    with tempfile.TemporaryDirectory(prefix="brainloom-forms-") as home:
        environment = {**kept, **private_environment(), "PREFECT_HOME": home, "PREFECT_LOGGING_LEVEL": "ERROR"}
        command = [sys.executable, "-m", "infra.form_schemas", *dict.fromkeys(entrypoints)]
        done = subprocess.run(
            command, cwd=home, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no words"])[-1]
        raise FormError(f"the flows cannot be imported here: {last}")
    return dict(json.loads(done.stdout))


def main(entrypoints: Sequence[str]) -> None:
    """Print the schema of each entrypoint as `prefect deploy` registers it (prefect 3.8.8)."""
    from prefect.flows import load_flow_from_entrypoint
    from prefect.utilities.callables import parameter_schema

    found = {name: parameter_schema(load_flow_from_entrypoint(name)) for name in entrypoints}
    print(json.dumps({name: schema.model_dump(mode="json", exclude_unset=True) for name, schema in found.items()}))


if __name__ == "__main__":
    main(sys.argv[1:])
