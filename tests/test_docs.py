"""What the pages promise: links resolve, commands parse, flows accept the YAML, and the reference is built."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml

from brainloom.cli import FLOWS, app

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
QUICK_STARTS = ("quickstart-data", "quickstart-training")
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
CONFIG = re.compile(r"brainloom (\w+) (?:.* )?(?:--config|-c) (\S+\.yaml)")
PLACEHOLDER = re.compile(r"[.]{3}|…|\w\|\w|\[-|<")
"""Marks of a line that shows a form and is no command: `...`, `a|b`, `[--option]`, `<id>`."""


def page_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def prose(text: str) -> str:
    """Return a page without code, whose brackets are no links."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    found: set[str] = set()
    for title in re.findall(r"^#+ +(.+?) *$", FENCE.sub("", text), re.MULTILINE):
        words = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower())
        name = base = words.replace(" ", "-")
        count = 0
        while name in found:
            count += 1
            name = f"{base}-{count}"
        found.add(name)
    return found


@pytest.mark.parametrize("page", PAGES, ids=page_of)
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    broken = []
    for link in LINK.findall(prose(text_of(page))):
        if re.match(r"\w+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        if not target.exists() or (anchor and anchor not in anchors(text_of(target))):
            broken.append(link)
    assert not broken, f"{page_of(page)}: {', '.join(broken)}"


@pytest.mark.parametrize("page", PAGES, ids=page_of)
def test_pages_that_are_named_exist(page: Path) -> None:
    named = set(re.findall(r"\bdocs/[a-z][\w./-]*\.md\b", text_of(page)))
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]


def test_anchors_are_those_of_github() -> None:
    assert anchors("# A `store`, and *S3*\n## A/B: x_y\n## A/B: x_y\n") == {"a-store-and-s3", "ab-x_y", "ab-x_y-1"}


def commands(text: str) -> list[list[str]]:
    """Return the words of every complete `brainloom ...` line of a page's blocks of code."""
    blocks = [body for language, body in FENCE.findall(text) if language in ("", "bash")]
    blocks += re.findall(r"(?:^    .*\n)+", FENCE.sub("", text), re.MULTILINE)
    found = []
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        line = re.sub(r"^(\$ |[A-Z_]+=\S+ +)*", "", re.sub(r"\s#.*$", "", line.strip()))
        if line.startswith("brainloom ") and not PLACEHOLDER.search(line):
            found.append(shlex.split(re.split(r" (?:>|\||&&) ", line)[0])[1:])
    return found


def parse(words: list[str]) -> None:
    """Let the command line read some words and call nothing; raises click's UsageError for what it does not know."""
    command: Any = typer.main.get_command(app)
    context, rest = click.Context(command, info_name="brainloom"), words
    while isinstance(command, click.Group):
        name, command, rest = command.resolve_command(context, rest)
        assert command is not None
        context = command.make_context(name, rest, parent=context, resilient_parsing=isinstance(command, click.Group))


@pytest.mark.parametrize("page", PAGES, ids=page_of)
def test_commands_of_the_pages_are_commands(page: Path) -> None:
    for words in commands(text_of(page)):
        try:
            parse(words)
        except click.ClickException as error:
            pytest.fail(f"{page_of(page)}: brainloom {shlex.join(words)}: {error.format_message()}")


def params_model(verb: str) -> Any:
    module, name, _ = FLOWS[verb]
    return getattr(import_module(module), name)


@pytest.mark.parametrize("name", QUICK_STARTS)
def test_every_configuration_of_a_quick_start_is_read_by_a_command_and_accepted(name: str) -> None:
    text = text_of(ROOT / "docs" / f"{name}.md")
    blocks = [body for language, body in FENCE.findall(text) if language == "yaml"]
    files = {body.split("\n", 1)[0].removeprefix("# "): yaml.safe_load(body) for body in blocks}
    read = {file: verb for verb, file in CONFIG.findall(text)}
    assert set(files) == set(read)
    assert len(files) == len(blocks)
    for file, content in files.items():
        params_model(read[file]).model_validate(content)


def is_accepted(verb: str, content: dict[str, Any]) -> bool:
    try:
        params_model(verb).model_validate(content)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("page", [page for page in PAGES if "```yaml" in text_of(page)], ids=page_of)
def test_configurations_of_the_pages_are_accepted_by_a_flow(page: Path) -> None:
    """Blocks that name a workspace or a catalog are whole; others show a part, and sources have a test of their own."""
    for language, body in FENCE.findall(text_of(page)):
        content = yaml.safe_load(body) if language == "yaml" else None
        if isinstance(content, dict) and {"workspace", "catalog"} & set(content):
            assert any(is_accepted(verb, content) for verb in FLOWS), f"{page_of(page)}: no flow takes\n{body}"


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("pdoc") is None, reason="needs pdoc (extra dev)")
def test_the_reference_is_built_from_docstrings_without_network(tmp_path: Path) -> None:
    offline = """
import runpy, socket, sys
def refuse(*_):
    raise AssertionError("something was fetched")
socket.socket.connect = refuse
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""
    modules = ["brainloom", "infra", "models.store", "models.records", "tasks.catalog"]
    command = [sys.executable, "-c", offline, str(ROOT / "docs/reference.py"), "-o", str(tmp_path), *modules]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'index.html'}\n"
    public = (tmp_path / "brainloom.html").read_text(encoding="utf-8")
    for name in ("open_store", "CaseDataset", "load_encoder"):
        assert f'id="{name}"' in public
    assert "infra/settings.html" in {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.html")}


def test_the_reference_says_what_is_missing(tmp_path: Path) -> None:
    code = "import sys; sys.modules['pdoc'] = None; import runpy; runpy.run_path(sys.argv[1])['build']([], '.')"
    command = [sys.executable, "-c", code, str(ROOT / "docs/reference.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "pdoc is missing; the extra `dev` has it: make install\n")
