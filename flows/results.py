"""Tables and pictures of benchmarks as files, and as artifacts of a flow run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flows.artifacts import png_markdown, publish_markdown, publish_table
from infra.storage import write_bytes
from tasks import tables
from tasks.evaluation import NATIVE
from tasks.leaderboard import NAME, Leaderboard
from tasks.report import FURTHER, TableSection
from tasks.tables import BenchmarkTable


def publish_tables(found: Sequence[BenchmarkTable], folder: Path) -> None:
    """Publish every table with its pictures, and the leaderboard, as artifacts of this flow run."""
    for table in found:
        name = table.benchmark.name
        pictures = [png_markdown(path.read_bytes(), path.stem) for path in sorted(folder.glob(f"{name}.*.png"))]
        further = (folder / f"{name}.{kind}.md" for kind in FURTHER)
        more = [path.read_text(encoding="utf-8") for path in further if path.exists()]
        text = "\n\n".join([tables.to_markdown(table), *more, *pictures])
        publish_markdown(f"benchmark-{name}", text, "Benchmark table")
        publish_table(f"scores-{name}", tables.artifact_rows(table), table.benchmark.title)
    if (board := folder / f"{NAME}.md").exists():
        publish_markdown(NAME, board.read_text(encoding="utf-8"), "Leaderboard")


def write_leaderboard(board: Leaderboard | None, folder: Path) -> None:
    """Write `leaderboard.md` and `.csv`; without one, what an earlier evaluation left is removed."""
    for suffix, text in (("md", board.to_markdown()), ("csv", board.to_csv())) if board else ():
        write_bytes(str(folder / f"{NAME}.{suffix}"), text.encode("utf-8"))
    for stale in () if board else folder.glob(f"{NAME}.*"):
        stale.unlink()


def write_section(section: TableSection, folder: Path) -> None:
    """Write `<benchmark>.md`, `.csv` and `.tex`, and what there is of pictures and of further tables.

    What an earlier evaluation left and this one does not write is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name, table = section.table.benchmark.name, section.table
    for suffix, text in (
        ("md", tables.to_markdown(table)),
        ("csv", tables.to_csv(table)),
        ("tex", tables.to_latex(table)),
    ):
        write_bytes(str(folder / f"{name}.{suffix}"), text.encode("utf-8"))
    stale_files = (
        f"{name}.*.png",
        *(f"{name}.{kind}.*" for kind in (*FURTHER, "reliability", "confusion")),
        f"{name}{NATIVE}.*",
    )
    for stale in (path for pattern in stale_files for path in folder.glob(pattern)):
        stale.unlink()
    for k, picture in enumerate(section.pictures):
        write_bytes(str(folder / f"{name}.{k}.png"), picture.png)
    if section.reliability is not None:
        write_bytes(str(folder / f"{name}.reliability.csv"), section.reliability.to_csv(index=False).encode())
    if section.confusion is not None:
        write_bytes(str(folder / f"{name}.confusion.csv"), section.confusion.to_csv(index=False).encode())
    for kind, other in section.further.items():
        write_bytes(str(folder / f"{name}.{kind}.md"), other.to_markdown().encode())
        write_bytes(str(folder / f"{name}.{kind}.csv"), other.to_csv().encode())
