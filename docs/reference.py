"""Build the API reference from docstrings: `make docs`, or `python docs/reference.py [-o FOLDER] [MODULE ...]`.

Nothing is fetched: pages, styles and search index are pdoc's own files.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

PACKAGES = ("brainloom", "flows", "tasks", "models", "infra")
FOLDER = Path("build/docs")


def build(modules: list[str], folder: Path) -> None:
    """Write a page of HTML for each module, and for all below each package, into a folder.

    Raises SystemExit without pdoc, with what to do.
    """
    try:
        import pdoc
        import pdoc.render
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error.name} is missing; the extra `dev` has it: make install") from error
    import brainloom

    # The public names are imported on first use; pdoc looks at the module's own dictionary.
    for name in brainloom.__all__:
        setattr(brainloom, name, getattr(brainloom, name))
    pdoc.render.configure(show_source=False, footer_text=f"brainloom {brainloom.__version__}, not for clinical use")
    # Names that only type checkers import stay as they are written.
    warnings.filterwarnings("ignore", message="Error parsing type annotation")
    warnings.filterwarnings("error", message="Found .* but it does not resolve")
    pdoc.pdoc(*modules, output_directory=folder)


def main() -> None:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="*", default=list(PACKAGES), help="Modules and packages; default: all five.")
    parser.add_argument("-o", "--output", type=Path, default=FOLDER, help=f"Default: {FOLDER}.")
    arguments = parser.parse_args()
    build(arguments.modules, arguments.output)
    sys.stdout.write(f"{arguments.output / 'index.html'}\n")


if __name__ == "__main__":
    main()
