"""Measure speed and print ratios, times and the machine as Markdown; about three minutes, one thread."""

from __future__ import annotations

import os

# Thread pools read these when their libraries are loaded.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS", "BLOSC_NTHREADS")
os.environ.update(dict.fromkeys(THREADS, "1"))

from infra.settings import private_environment  # noqa: E402

os.environ.update(private_environment())

from bench.suite import main  # noqa: E402

if __name__ == "__main__":
    main()
