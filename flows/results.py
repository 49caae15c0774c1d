"""Tables and pictures of benchmarks as files, and as artifacts of a flow run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        title, first, *rest = tables.to_markdown(table).split("\n\n")
        text = "\n\n".join([title, first, *pictures, *more, *rest])
        publish_markdown(f"benchmark-{name}", text, f"{table.benchmark.title}: all rows, with intervals and pictures")
        publish_table(f"scores-{name}", tables.artifact_rows(table), f"{table.benchmark.title}: the main scores")
    if (board := folder / f"{NAME}.md").exists():
        publish_markdown(NAME, board.read_text(encoding="utf-8"), "Ranks of the rows over all benchmarks")


def write_files(folder: Path, contents: Mapping[str, bytes]) -> list[Path]:
    """Write files by their names and return their paths."""
    for name, content in contents.items():
        write_bytes(str(folder / name), content)
    return [folder / name for name in contents]


def write_leaderboard(board: Leaderboard | None, folder: Path) -> list[Path]:
    """Write `leaderboard.md`, `.csv` and `.tex` and return them; without one, what was left before is removed."""
    texts = {"md": board.to_markdown(), "csv": board.to_csv(), "tex": board.to_latex(NAME)} if board else {}
    for stale in () if board else folder.glob(f"{NAME}.*"):
        stale.unlink()
    return write_files(folder, {f"{NAME}.{suffix}": text.encode() for suffix, text in texts.items()})


def write_section(section: TableSection, folder: Path) -> list[Path]:
    """Write `<benchmark>.md`, `.csv` and `.tex`, and what there is of pictures and of further tables; return the files.

    What an earlier evaluation left and this one does not write is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name, table = section.table.benchmark.name, section.table
    stale_files = (
        f"{name}.*.png",
        *(f"{name}.{kind}.*" for kind in (*FURTHER, "reliability", "confusion")),
        f"{name}{NATIVE}.*",
    )
    for stale in (path for pattern in stale_files for path in folder.glob(pattern)):
        stale.unlink()
    contents: dict[str, bytes] = {
        "md": tables.to_markdown(table).encode(),
        "csv": tables.to_csv(table).encode(),
        "tex": tables.to_latex(table).encode(),
    }
    contents |= {f"{k}.png": picture.png for k, picture in enumerate(section.pictures)}
    for kind, frame in (("reliability", section.reliability), ("confusion", section.confusion)):
        if frame is not None:
            contents[f"{kind}.csv"] = frame.to_csv(index=False).encode()
    for kind, other in section.further.items():
        contents |= {f"{kind}.md": other.to_markdown().encode(), f"{kind}.csv": other.to_csv().encode()}
        contents[f"{kind}.tex"] = other.to_latex(f"{name}-{kind}").encode()
    return write_files(folder, {f"{name}.{ending}": content for ending, content in contents.items()})
