"""Phantom: write a cohort made from real anatomy, for demos, tests and load."""

from __future__ import annotations

from typing import Any

from prefect import flow, runtime
from pydantic import ConfigDict, Field

from flows.forms import Form
from flows.progress import Progress
from tasks.phantom import PhantomConfig, write_cohort


class PhantomParams(Form):
    """Which phantom cohort to write, and where."""

    model_config = ConfigDict(title="Phantom cohort")

    cohort: PhantomConfig = Field(PhantomConfig(), title="Cohort", description="Size, seed and acquisition.")
    root: str = Field(title="Folder", description="Local folder that receives both datasets.", min_length=1)
    processes: int = Field(2, ge=1, le=256, title="Processes", description="Worker processes, from 1 to 256.")


def _run_name() -> str:
    params = runtime.flow_run.parameters["params"]
    cohort = params["cohort"] if isinstance(params, dict) else params.cohort.model_dump()
    return f"phantom {cohort.get('bids_subjects', '')} + {cohort.get('datalist_subjects', '')} subjects"


@flow(name="phantom", flow_run_name=_run_name)
def phantom(params: PhantomParams) -> dict[str, Any]:
    """Write what is missing of a cohort; equal parameters give byte-identical files."""
    with Progress("phantom", 0, "subjects") as progress:

        def show(done: int, total: int) -> None:
            progress.total = total
            progress.update(done)

        paths = write_cohort(params.cohort, params.root, progress=show, processes=params.processes)
    return {"bids": str(paths.bids), "datalist": str(paths.datalist), "broken": str(paths.broken)}
