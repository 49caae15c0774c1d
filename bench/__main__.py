"""Measure speed and print ratios, times and the machine as Markdown.

`python -m bench`: one thread, some minutes, then a step of training on two; `python -m bench step`: that alone;
`python -m bench scale`: 16,021 small scans through the flow, two minutes.
"""

from __future__ import annotations

import os
import sys

# Thread pools read these when their libraries are loaded.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS", "BLOSC_NTHREADS")
os.environ.update(dict.fromkeys(THREADS, "1"))

from infra.clusters import WORKER_MALLOC  # noqa: E402
from infra.settings import private_environment  # noqa: E402

if not os.environ.keys() >= WORKER_MALLOC.keys():
    # glibc reads these at the start of a process only; workers run with them, so all rivals here do.
    os.execve(sys.executable, [sys.executable, "-m", "bench", *sys.argv[1:]], os.environ | WORKER_MALLOC)

os.environ.update(private_environment())

from bench import scale, step, suite  # noqa: E402

if __name__ == "__main__":
    {"scale": scale.main, "step": step.main}.get(" ".join(sys.argv[1:]), suite.main)()
