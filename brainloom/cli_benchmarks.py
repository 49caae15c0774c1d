"""`brainloom benchmarks`: what is registered, what was published about it, and where the data are to be had."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

benchmarks_app = typer.Typer(
    help="Registered benchmarks: list them (without a word behind), show one with a catalog of its data, page.",
    invoke_without_command=True,
)


@benchmarks_app.callback()
def list_benchmarks(context: typer.Context) -> None:
    """List every registered benchmark: its protocol, who may have its data, and how sure the task is."""
    if context.invoked_subcommand is not None:
        return
    from tasks.dataset_cards import cards_of  # keeps `--help` fast
    from tasks.registry import REGISTERED

    table = Table("benchmark", "protocol", "access to its data", "basis", box=None, pad_edge=False)
    for one in REGISTERED.values():
        access = ", ".join(dict.fromkeys(card.access for card in cards_of(one)))
        table.add_row(one.name, one.protocol, access, one.basis)
    Console().print(table)


@benchmarks_app.command()
def show(name: Annotated[str, typer.Argument(help="As `brainloom benchmarks` lists it.")]) -> None:
    """Print what a benchmark is, what was published about it, and a ready catalog.yaml that reads its data."""
    from tasks.benchmark_page import description  # keeps `--help` fast
    from tasks.registry import find_registered

    try:
        benchmark = find_registered(name)
    except KeyError as error:
        raise typer.BadParameter(str(error.args[0]), param_hint="NAME") from None
    typer.echo(description(benchmark), nl=False)


@benchmarks_app.command()
def page() -> None:
    """Print docs/benchmarks.md as the registry says it now."""
    from tasks.benchmark_page import one_page  # keeps `--help` fast

    typer.echo(one_page(), nl=False)
