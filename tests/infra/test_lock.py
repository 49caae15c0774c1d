from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]


def locked() -> dict[str, Version]:
    found: dict[str, Version] = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==(\S+)", line)
            assert match, f"{line!r} is not an exact pin"
            assert canonicalize_name(match[1]) not in found, f"{line!r} is there twice"
            found[canonicalize_name(match[1])] = Version(match[2])
    return found


def wanted() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize("requirement", wanted(), ids=lambda requirement: requirement.name)
def test_every_dependency_is_locked_at_a_version_that_satisfies_it(requirement: Requirement) -> None:
    version = locked()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version), f"{requirement} is locked at {version}"


def test_torch_has_no_local_version() -> None:
    assert re.findall(r"^torch==.*$", (ROOT / "requirements.lock").read_text(), re.MULTILINE) == ["torch==2.13.0"]
    assert all(version.local is None for version in locked().values())


def test_fastapi_is_one_that_prefect_works_with_and_the_reason_is_written_down() -> None:
    assert locked()["fastapi"] < Version("0.151")
    for name in ("requirements.lock", "pyproject.toml"):
        assert re.search(r"#.*(fastapi|prefect 3\.8\.8).*0\.151", (ROOT / name).read_text())


def test_sqlalchemy_is_one_that_prefect_makes_scheduled_flow_runs_with() -> None:
    assert locked()["sqlalchemy"] < Version("2.1")


def test_we_and_the_optional_cuda_packages_are_not_locked() -> None:
    assert not {"brainloom", "dask-cuda", "pip", "setuptools"} & set(locked())
