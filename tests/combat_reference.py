"""What neuroCombat and neuroHarmonize answer for a small cohort: makes tests/golden/combat.json.

    python -m venv combat && combat/bin/pip install "numpy<2" neuroCombat==0.2.12 neuroHarmonize==2.5.2
    combat/bin/python tests/combat_reference.py

Run in an environment of its own: neuroHarmonize asks for numpy < 2. neuroCombat harmonises the training cases;
neuroHarmonize, which is built on it, also applies what it has fitted to new cases. Their iteration stops at a change of
1e-4; here it runs until it rests. This file needs NumPy only; the tests import the cohort from it.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden" / "combat.json"
TRAINING = 36
_DRAWN = np.random.RandomState(0)  # its stream is frozen, unlike that of default_rng
SITES = tuple("AABCBACCB"[k % 9] for k in range(48))
AGE = _DRAWN.uniform(20, 80, 48).round(1)
SEX = (np.arange(48) // 2 % 2).astype(np.float64)
_SHIFT, _SCALE = ({"A": 0.0, "B": 1.5, "C": -2.0}, {"A": 1.0, "B": 2.0, "C": 0.6})
_NOISE = _DRAWN.standard_normal((48, 5))
FEATURES = (
    np.array([_SHIFT[site] for site in SITES])[:, None] * np.linspace(0.5, 1.5, 5)
    + np.array([_SCALE[site] for site in SITES])[:, None] * _NOISE * np.linspace(1, 3, 5)
    + 0.05 * AGE[:, None]
    + np.linspace(-1, 1, 5) * SEX[:, None]
).round(4)
"""Five features of 48 cases, of which the first TRAINING ones are fitted."""


def main() -> None:
    """Write the golden file."""
    import pandas as pd
    from neuroCombat import neuroCombat  # type: ignore[import-not-found]
    from neuroHarmonize import harmonizationApply, harmonizationLearn  # type: ignore[import-not-found]

    module = __import__("neuroCombat.neuroCombat", fromlist=["it_sol"])
    module.it_sol.__defaults__ = (1e-13,)
    plain = pd.DataFrame({"SITE": SITES})
    people = plain.assign(AGE=AGE, SEX=SEX)
    train, test = slice(None, TRAINING), slice(TRAINING, None)
    found = {}
    for name, table in (("without covariates", plain), ("with age and sex", people)):
        others = [column for column in table if column != "SITE"]
        first = neuroCombat(FEATURES[train].T, table[train], "SITE", continuous_cols=others)["data"].T
        model, second = harmonizationLearn(FEATURES[train], table[train])
        applied = harmonizationApply(FEATURES[test], table[test].reset_index(drop=True), model)
        found[name] = {"neuroCombat": first.tolist(), "neuroHarmonize": second.tolist(), "applied": applied.tolist()}
    versions = {name: version(name) for name in ("neuroCombat", "neuroHarmonize")}
    GOLDEN.write_text(json.dumps({"versions": versions, **found}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
