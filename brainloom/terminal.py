"""What all verbs share: a terminal without Prefect's log lines, a Prefect of our own, errors without tracebacks."""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from infra.log_lines import CONSOLE_FORMATTER, log_environment
from infra.server import without_prefect
from infra.settings import Settings, private_environment
from tasks.markdown_text import told_by_cell

CONSOLE_LEVEL = "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"
"""Overrides one key of Prefect's logging.yml: its console handler. The handler that feeds the UI keeps INFO."""
TABLE_WIDTH = 130
"""Columns that a printed table may take at least; narrower terminals wrap its lines."""
FILE_ERRORS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
"""What a wrong path raises."""
FINISHED_FAILED = "Finished in state Failed"
"""Start of Prefect's last line of a run."""
OWN_PACKAGES = frozenset({"brainloom", "flows", "tasks", "models", "infra"})


def console(stderr: bool = False) -> Console:
    """Return a console that does not wrap paths and addresses: they must survive copying from a log."""
    return Console(stderr=stderr, soft_wrap=True, highlight=False)


def print_table(text: str) -> None:
    """Print the tables of a Markdown text to standard output."""
    width = max(TABLE_WIDTH, Console().width)
    for table in markdown_tables(text):
        Console(width=width, highlight=False).print(table)


def markdown_tables(text: str) -> list[Table]:
    """Return the tables of a Markdown text, the first under the text's heading; cells are folded, never cut.

    Raises ValueError when there is none.
    """
    lines = text.splitlines()
    title: str | None = next((line.lstrip("# ") for line in lines if line.startswith("#")), "")
    found = []
    for is_table, block in itertools.groupby(lines, lambda line: line.startswith("|")):
        rows = [_cells(line) for line in block] if is_table else []
        if len(rows) > 1:
            found.append(_table(rows, title))
            title = None
    if not found:
        raise ValueError(f"no Markdown table in: {text[:80]!r}")
    return found


def _table(rows: list[list[str]], title: str | None) -> Table:
    shown = escape(title) if title else None
    table = Table(title=shown, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for k, name in enumerate(rows[0]):
        table.add_column(escape(name), overflow="fold", no_wrap=k == 0)
    for row in rows[2:]:
        table.add_row(*(escape(_stacked(text)) for text in row))
    return table


def _stacked(cell: str) -> str:
    """Return a number with its interval below it: `0.42 [0.31, 0.53]` in three short lines."""
    number, bracket, interval = cell.partition(" [")
    return f"{number}\n[{interval.replace('no interval', '–').replace(', ', f',{chr(10)}')}" if bracket else cell


def _cells(line: str) -> list[str]:
    return [told_by_cell(cell.strip()) for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]


def _use_api(url: str | None) -> str | None:
    """Let this process and its children use a server; raises BadParameter for what is no address of an API."""
    if url:
        try:
            Settings(api_url=url)
        except ValidationError as error:
            wrong = [one["msg"].removeprefix("Value error, ") for one in error.errors() if one["loc"] == ("api_url",)]
            if not wrong:
                raise  # other settings
            raise typer.BadParameter(wrong[0]) from None
        os.environ[API_URL] = url
    return url


API_URL = "BRAINLOOM_API_URL"
ApiUrl = Annotated[
    str | None,
    typer.Option(
        "--api-url", envvar=API_URL, callback=_use_api, is_eager=True,
        help="API of a Prefect server that runs already, e.g. http://host:4200/api, used with the caller's Prefect "
        "profile. Default: our own server on this machine.",
    ),
]  # fmt: skip
"""Option of every command that talks to a server. Its effect is the variable: the settings of all children read it."""


def prepare_prefect(settings: Settings) -> None:
    """Import Prefect, apart from the caller's profile and with a console that shows warnings only.

    Call it before any flow is imported; `infra.server.connect` then points Prefect at the server. Set
    PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL=INFO to see all log lines in the terminal; the UI always has them. With
    BRAINLOOM_LOG=json each is a JSON object (infra.log_lines).
    """
    asked = {name: os.environ[name] for name in (CONSOLE_LEVEL, CONSOLE_FORMATTER) if name in os.environ}
    if settings.api_url is None:
        ours = without_prefect(os.environ)
        os.environ.clear()
        os.environ.update(ours)
        settings.server_dir.mkdir(parents=True, exist_ok=True)  # Prefect warns when it cannot make its parent
        os.environ["PREFECT_HOME"] = str(settings.server_dir)
    os.environ.update({**private_environment(), CONSOLE_LEVEL: "WARNING", **log_environment(settings.log), **asked})
    import prefect.main  # noqa: F401 - reads the environment and installs the console handler

    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_news)


@contextmanager
def folder_of(what: str, folder: Path) -> Iterator[None]:
    """Say what a folder is for when it, or one of its parents, can be neither made nor read inside: a ValueError."""
    wanted = folder.expanduser().absolute()
    try:
        yield
    except OSError as error:
        if isinstance(error, IsADirectoryError) or not isinstance(error.filename, str | bytes):
            raise  # it is there, or no path was the matter
        name = Path(os.fsdecode(error.filename)).absolute()
        below = isinstance(error, NotADirectoryError) and name.is_relative_to(wanted)
        if not below and not wanted.is_relative_to(name):
            raise
        raise ValueError(f"{what}: {name} can be neither made nor read: {error.strerror}") from error


def _is_news(record: logging.LogRecord) -> bool:
    """Drop what says nothing new.

    The traceback that every flow run around a failed one logs again, that of a task refused for wrong input, and the
    last line of a failed task, which repeats its error: the error itself ends the command. A nanny's complaints:
    workers that are slow to close are ended, and those that die are told by the flow.
    """
    repeated = record.name.startswith("prefect.flow_runs") and record.levelno == logging.ERROR
    error = record.exc_info[1] if record.exc_info else None
    if record.name.startswith("prefect.task_runs"):
        told = isinstance(error, Exception) and is_expected(error)
        repeated = told or record.getMessage().startswith(FINISHED_FAILED)
    return not repeated and not (record.name == "distributed.nanny" and record.levelno < logging.ERROR)


def is_expected(error: Exception) -> bool:
    """Say whether an error speaks to the user: one of our own, or what wrong input and absent files raise."""
    ours = type(error).__module__.split(".")[0] in OWN_PACKAGES
    return ours or isinstance(error, (ValueError, *FILE_ERRORS))
