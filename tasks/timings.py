"""What preprocessing's time went into: seconds by step, over all cases of a flow run, as a table and a JSON file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infra import storage
from models.store_layout import BUILD

FILE = "timings.json"
STEPS = {
    "read": "bytes of the sources",
    "decode": "gunzip, header and checks of the voxels",
    "correct": "N4 and registration",
    "resample": "onto the grid of the case",
    "scale": "crop, percentiles, [0, 1]",
    "quality": "measures of quality, fingerprint",
    "connectome": "signals and matrix",
    "encode": "chunks of the shards",
    "write": "shards to the disk or S3",
    "digest": "of the voxels",
    "receipt": "receipts and markers of attempts",
    "other": "all between the steps",
}
"""Steps of a case in their order, and what is in them."""


def timings_url(store_url: str) -> str:
    """Return where the timings of the last flow run that preprocessed something lie."""
    return storage.join(store_url, BUILD, FILE)


def timings_of(seconds: Mapping[str, float], cases: int, wall_seconds: float, workers: int) -> dict[str, Any]:
    """Return what timings.json holds: the seconds of workers by step in their order, and what they are made from.

    seconds: of all workers, by step; wall_seconds: by the clock, from the first case to the last.
    """
    names = [name for name in (*STEPS, *sorted(set(seconds) - set(STEPS))) if name in seconds]
    rate = round(cases / wall_seconds, 4) if wall_seconds > 0 else 0.0
    facts = {"cases": cases, "workers": workers, "wall_seconds": round(wall_seconds, 3), "cases_per_second": rate}
    return {**facts, "seconds": {name: round(seconds[name], 3) for name in names}}


def write_timings(store_url: str, timings: Mapping[str, Any]) -> None:
    """Replace timings.json of a store; it is no part of any digest."""
    storage.write_json(timings_url(store_url), dict(timings))


def timings_rows(timings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a table row per step: step, what it is, seconds, ms a case, share."""
    seconds, cases = timings["seconds"], max(1, timings["cases"])
    total = sum(seconds.values()) or 1.0
    return [
        {
            "step": name,
            "what": STEPS.get(name, ""),
            "seconds": round(value, 2),
            "ms a case": round(1000 * value / cases, 1),
            "share": f"{value / total:.1%}",
        }
        for name, value in seconds.items()
    ]


def largest_steps(seconds: Mapping[str, float], count: int = 3) -> str:
    """Return the steps that take most, for a line of progress: `encode 41 %, decode 30 %, scale 11 %`; may be empty."""
    total = sum(seconds.values())
    most = sorted(seconds.items(), key=lambda item: -item[1])[:count]
    return ", ".join(f"{name} {value / total:.0%}".replace("%", " %") for name, value in most) if total > 0 else ""
