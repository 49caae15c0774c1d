"""Every registered benchmark, whatever its protocol: fine-tuned, probed and prompted ones in one list."""

from __future__ import annotations

from tasks.benchmarks import BENCHMARKS, Benchmark
from tasks.probe_tasks import PROBES
from tasks.prompt_tasks import PROMPT_TASKS

REGISTERED: dict[str, Benchmark] = {**BENCHMARKS, **PROBES, **PROMPT_TASKS}
"""By name; the names of the three registries are distinct (tested)."""
FLOWS: dict[str, str] = {"fine-tune": "evaluate", "probe": "probe", "prompt": "prompt"}
"""Protocol -> the command that runs it."""


def find_registered(name: str) -> Benchmark:
    """Return a benchmark of any protocol; raises KeyError listing the known names."""
    try:
        return REGISTERED[name]
    except KeyError:
        raise KeyError(f"unknown benchmark {name!r}; known: {', '.join(REGISTERED)}") from None
