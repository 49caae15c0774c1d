"""The files around the code: make targets, hooks, licence, strict skips."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SKIPPING = """
import pytest

def test_runs():
    pass

def test_allowed():
    pytest.skip("needs a CUDA device")

@pytest.mark.skipif(True, reason="no browser here")
def test_unexpected():
    pass

@pytest.mark.xfail(reason="known")
def test_expected_failure():
    raise ValueError
"""


@pytest.mark.parametrize("strict", ["", "1"])
def test_an_unexpected_skip_fails_when_none_is_expected(tmp_path: Path, strict: str) -> None:
    for name in ("conftest.py", "prefect_connection.py"):
        (tmp_path / name).write_text((ROOT / "tests" / name).read_text())
    (tmp_path / "test_skipping.py").write_text(SKIPPING)
    (tmp_path / "test_module.py").write_text('import pytest\npytest.skip("whole module", allow_module_level=True)\n')
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"],
        cwd=tmp_path,
        env={**os.environ, "BRAINLOOM_EXPECT_NO_SKIPS": strict},
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.findall(r"unexpected skip \(BRAINLOOM_EXPECT_NO_SKIPS=1\): (.*)", done.stdout)
    if strict:
        assert {"no browser here", "whole module"} <= set(found)
        assert (done.returncode, "1 passed, 1 skipped, 1 xfailed, 2 errors" in done.stdout) == (1, True)
    else:
        assert (done.returncode, "1 passed, 3 skipped, 1 xfailed" in done.stdout) == (0, True)


def test_the_make_targets_are_listed_by_help() -> None:
    text = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("help", "install", "demo", "up", "down", "check", "test", "test-full", "bench", "docs", "clean"):
        assert f"make {target} " in text


def test_the_hooks_download_nothing() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    assert {hook["language"] for hook in config["repos"][0]["hooks"]} == {"system"}


def test_ci_runs_both_test_targets_and_expects_no_skips() -> None:
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    assert lines[-3:] == ["export BRAINLOOM_EXPECT_NO_SKIPS=1", "make test", "make test-full"]
    assert "set -euo pipefail" in lines


def test_licence_and_citation_agree_with_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["license"] == project["license"] == "Apache-2.0"
    assert citation["version"] == project["version"]
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text()
