"""Measure speed and print ratios, times and the machine as Markdown.

`python -m bench`: one thread, some minutes, then a step of training on two; `python -m bench step`: that alone;
`python -m bench metrics`: HD95 against MONAI's; `python -m bench scoring --cases 40`: the shares of predicting and
scoring of a segmentation benchmark; `python -m bench scale`: 16,021 small scans through the flow, three minutes;
`python -m bench scale --kills 5`: the same killed at five random moments and started again each time, four minutes;
`python -m bench load`: 20 flow runs at once through deployments, on SQLite and on PostgreSQL, a quarter of an hour
or more.
"""

from __future__ import annotations

import argparse
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

from bench import load, metrics, scale, scoring, step, suite  # noqa: E402

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure speed; prints Markdown.")
    what = ("suite", "step", "metrics", "scoring", "scale", "load")
    parser.add_argument("what", nargs="?", choices=what, default="suite")
    parser.add_argument("--runs", type=int, default=load.RUNS, help="load: flow runs that are started at once")
    parser.add_argument("--kills", type=int, default=0, help="scale: kill a preprocess this often instead")
    parser.add_argument("--share", type=float, default=1.0, help="scale --kills: share of the 16,021 scans")
    parser.add_argument("--cases", type=int, default=scoring.CASES, help="scoring: full-size cases to predict")
    asked = parser.parse_args()
    if (asked.kills or asked.share != 1) and asked.what != "scale":
        parser.error("--kills and --share belong to scale")
    if asked.cases < 1 or (asked.cases != scoring.CASES and asked.what != "scoring"):
        parser.error("--cases belongs to scoring, 1 or more")
    if asked.runs < 1 or (asked.runs != load.RUNS and asked.what != "load"):
        parser.error("--runs belongs to load, 1 or more")
    if asked.what == "scoring":
        scoring.main(asked.cases)
    elif asked.what == "scale":
        scale.main(asked.kills, asked.share)
    elif asked.what == "load":
        load.main(asked.runs)
    else:
        {"step": step.main, "metrics": metrics.main, "suite": suite.main}[asked.what]()
