"""`brainloom compare`: what changed between the scores of two workspaces."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def compare(
    before: Annotated[Path, typer.Argument(help="Workspace, or a scores.parquet.")],
    after: Annotated[Path, typer.Argument(help="Workspace, or a scores.parquet.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write the table into this file.")] = None,
) -> None:
    """Compare the scores of two workspaces row by row: what changed, significantly or not."""
    from tasks.comparison import compare_scores, read_scores  # keeps `--help` fast

    text = compare_scores(read_scores(before), read_scores(after)).to_markdown()
    if out is not None:
        out.write_text(text, encoding="utf-8")
    typer.echo(text)
