"""What the registry says about benchmarks, in words: for the command line and for docs/benchmarks.md, made from it."""

from __future__ import annotations

from collections.abc import Iterable

from tasks.benchmarks import BENCHMARKS, Benchmark, SplitProtocol
from tasks.dataset_cards import cards_of, catalog_yaml, dataset_cards
from tasks.registry import FLOWS, REGISTERED
from tasks.tables import METRIC_NAMES, heading, markdown_rows

PUBLISHED = ["benchmark", "method", "metric", "value", "basis", "source"]
"""Header of published numbers, which are shown as they were published."""
COMMAND = "brainloom benchmarks page > docs/benchmarks.md"
HEAD = f"""# Benchmarks

<!-- Made from the registry by `{COMMAND}`; do not edit. -->

Every downstream task of BrainMVP, AnatCL and CINP, and phantom twins. `brainloom benchmarks` lists them,
`brainloom benchmarks show NAME` prints one with a catalog that reads its data as they are shipped: save it as
catalog.yaml, put the data where `root` says, and run `brainloom catalog --config catalog.yaml`. Nothing is downloaded.

`confirmed`, `inferred` and `unverified` say how sure something is: of a task, whether cohort, labels and split are
known; of a published number, where it comes from; of a dataset, home, access, licence and layout. Tables show it beside
every published number. Tasks whose data are not in the store are `no data`, with where the data are to be had.

Subjects are divided in one split a workspace, stratified by dataset, labels, the columns below and site, and a test
subject never enters a pre-training. Shares of train, val and test are 70, 10 and 20 % unless said below. Probes and
prompts are cross-validated instead ([probes.md](probes.md), [prompting.md](prompting.md)).
"""


def one_page() -> str:
    """Return docs/benchmarks.md."""
    parts = [HEAD]
    for protocol, flow in FLOWS.items():
        mine = [one for one in REGISTERED.values() if one.protocol == protocol]
        rows = [[f"`{one.name}`", one.title, one.kind, _what(one), " ".join(one.modalities), one.basis] for one in mine]
        header = ["name", "task", "kind", "labels or target", "modalities", "basis"]
        parts += [f"## {protocol}: `brainloom {flow}`\n", *markdown_rows(header, rows), ""]
    parts += ["## Splits that differ\n", *markdown_rows(["name", "shares", "stratified by", "about it"], _splits()), ""]
    parts += [
        "## Where the data are\n",
        *markdown_rows(["dataset", "home", "access", "licence", "basis"], _homes()),
        "",
    ]
    parts += [f"- {card.title} (`{card.name}`): {card.note}." for card in dataset_cards().values() if card.note]
    parts += ["\n## Published numbers\n", *markdown_rows(PUBLISHED, _published(REGISTERED.values())), ""]
    claims = dict.fromkeys(f"- `{one.name}`: {claim}." for one in REGISTERED.values() for claim in one.claims)
    return "\n".join([*parts, *claims]) + "\n"


def description(benchmark: Benchmark) -> str:
    """Return one benchmark as Markdown: what it is, where the data are, what was published, a ready catalog."""
    facts = {
        "protocol": f"{benchmark.protocol} (`brainloom {FLOWS[benchmark.protocol]}`)",
        "kind": benchmark.kind,
        "modalities": " ".join(benchmark.modalities),
        "labels or target": _what(benchmark),
        "metrics": ", ".join(METRIC_NAMES[metric] for metric in benchmark.metrics),
        "split": _split(benchmark),
        "basis of the protocol": benchmark.basis,
        "published test size": str(benchmark.test_subjects or ""),
        "control": benchmark.control,
        "about it": benchmark.note,
    }
    lines = [f"# {benchmark.title} ({benchmark.name})", ""]
    lines += [f"- {name}: {text}" for name, text in facts.items() if text]
    for card in cards_of(benchmark):
        lines += ["", f"{card.title}: {card.home}", f"- access: {card.access}; licence: {card.licence}; {card.basis}"]
        lines += [f"- {card.note}"] if card.note else []
    rows = _published([benchmark])
    lines += ["", *(markdown_rows(PUBLISHED[1:], [row[1:] for row in rows]) if rows else ["No number was published."])]
    lines += [f"- {claim}" for claim in benchmark.claims]
    return "\n".join([*lines, "", "catalog.yaml:", "", catalog_yaml(benchmark)])


def _published(benchmarks: Iterable[Benchmark]) -> list[list[str]]:
    return [
        [f"`{one.name}`", row.method, heading(row.metric, row.region), f"{row.value:g}", row.basis, row.source]
        for one in benchmarks
        for row in one.published
    ]


def _what(benchmark: Benchmark) -> str:
    if benchmark.kind == "segmentation":
        regions = ", ".join(f"{one.name} {{{', '.join(map(str, one.labels))}}}" for one in benchmark.regions)
        return f"{benchmark.scheme}: {regions}" + "".join(f", or {name}" for name in benchmark.other_schemes)
    classes = f": {', '.join(benchmark.classes)}" if benchmark.classes else ""
    return f"{benchmark.target}{classes}"


def _split(benchmark: Benchmark) -> str:
    if benchmark.protocol != "fine-tune":
        return "folds by subject"
    shares = " / ".join(f"{100 * share:g}" for share in benchmark.split.shares)
    note = f"; {benchmark.split.note}" if benchmark.split.note else ""
    return f"{shares} % by subject, stratified by {', '.join(benchmark.split.stratify)}{note}"


def _splits() -> list[list[str]]:
    usual = SplitProtocol()
    return [
        [
            f"`{one.name}`",
            " / ".join(f"{100 * share:g}" for share in one.split.shares),
            ", ".join(one.split.stratify),
            one.split.note or "–",
        ]
        for one in BENCHMARKS.values()
        if (one.split.shares, one.split.stratify) != (usual.shares, usual.stratify)
    ]


def _homes() -> list[list[str]]:
    return [
        [
            f"`{card.name}`",
            f"`{card.home}`" if card.access == "made here" else card.home,
            card.access,
            card.licence,
            card.basis,
        ]
        for card in dataset_cards().values()
    ]
