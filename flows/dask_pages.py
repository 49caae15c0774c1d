"""Dask's pages of a flow run: a link to the live dashboard, and on request a performance report beside the store."""

from __future__ import annotations

import logging
import re
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from distributed import Client, performance_report
from prefect.context import FlowRunContext

from flows.artifacts import publish_markdown
from infra import storage
from models.records import PlannedCase
from tasks.qc_report import report_urls

KEY = "dask"
_ICON = re.compile(rb"<link rel=\"shortcut icon\"[^>]*>")
"""Dask's, which a browser would fetch from its site."""
_log = logging.getLogger(__name__)


def report_url(store_url: str) -> str:
    """Return where the performance report of a store's last flow run lies: `<store>-dask.html` beside it."""
    return report_urls(store_url)[0].removesuffix("-qc.html") + "-dask.html"


@contextmanager
def dask_pages(client: Client, store_url: str, cases: Sequence[PlannedCase], report: bool) -> Iterator[None]:
    """Link the dashboard while something runs on a cluster; afterwards write the performance report when asked.

    The report is written when the work inside ended without an error, and only when it names none of the source files:
    it has names of functions, times, addresses of workers and lines of our code. A report that cannot be made is a
    warning: nothing depends on it.
    """
    live = dashboard_text(client.dashboard_link)
    publish_markdown(KEY, live, "Dask's pages of this flow run")
    if not report:
        yield
        publish_markdown(KEY, "The Dask cluster of this flow run has ended.", "Dask's pages of this flow run")
        return
    with tempfile.TemporaryDirectory(prefix="brainloom-dask-") as folder:
        file = Path(folder, "report.html")
        # Inline: the page asks no server for its scripts.
        with client.as_current(), performance_report(str(file), mode="inline"):
            yield
        publish_markdown(KEY, _written(file, report_url(store_url), cases), "Dask's pages of this flow run")


def dashboard_text(link: str) -> str:
    """Return Markdown that leads to a dashboard, and says from which machine."""
    host = urlsplit(link).hostname or ""
    where = f", from {socket.gethostname()} only (or through a tunnel)" if host in ("127.0.0.1", "localhost") else ""
    run = FlowRunContext.get()
    name = f" of `{run.flow_run.name}`" if run and run.flow_run else ""
    return f"[Dask dashboard]({link}){name}, while it runs{where}.\n"


def _written(file: Path, target: str, cases: Sequence[PlannedCase]) -> str:
    text = _ICON.sub(b"", file.read_bytes())
    if named := names_in(text, cases):
        _log.warning("the performance report of Dask names %d source files and is not written", named)
        return "The performance report names source files and was not written."
    storage.write_bytes(target, text)
    return f"The Dask cluster of this flow run has ended; its performance report is at `{target}`."


def names_in(text: bytes, cases: Sequence[PlannedCase]) -> int:
    """Return how many source files a page names, by their path or the name of the file."""
    paths = [file.path for case in cases for file in case.files]
    return sum(path.rsplit("/", 1)[-1].encode() in text for path in paths)
