from __future__ import annotations

from flows.fitting import TABLE_CELL, fit_cell, fit_markdown

NARROW = "| a | b |\n| --- | --- |\n| 1 | x y z |"
METRICS = ["mean Dice", "Dice ET", "Dice TC", "Dice WT", "difference in mean Dice"]


def rows(*cells: list[str]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([head, "|" + " --- |" * len(cells[0]), *body])


def test_what_fits_stays_as_it_is() -> None:
    page = f"## Title\n\n{NARROW}\n\ntext | with a bar\n\n| no table\n"
    assert fit_markdown(page) == page


def test_an_interval_goes_below_its_estimate_and_is_not_broken() -> None:
    cells = ["0.060 [0.025, 0.073]"] * len(METRICS)
    fitted = fit_markdown(rows(["row", "n", *METRICS], ["pre-trained", "4", *cells]))
    assert fitted.splitlines()[2].count("0.060<br>[0.025, 0.073]") == len(METRICS)
    assert "difference in<br>mean Dice" in fitted


def test_prose_is_broken_before_names_are() -> None:
    detail = "(27, 36, 30) voxels, the image of the case has (30, 36, 30) voxels on another grid than this one"
    file = "sub-9004_space-orig_desc-tumour_dseg.nii.gz"
    fitted = fit_markdown(rows(["case", "file", "detail"], ["sub-9004", file, detail]))
    *_, last = fitted.splitlines()
    assert file in last
    assert "sub-9004 |" in last
    told = last.split("| ")[-1].removesuffix(" |").split("<br>")
    assert " ".join(told) == detail
    assert max(map(len, told)) < 60


def test_code_links_and_bars_stay_whole() -> None:
    link = "[a page of another flow run](/artifacts/artifact/0123)"
    cells = ["x " * 60 + r"a \| b", "`brainloom store verify --deep`", link]
    fitted = fit_markdown(rows(["text", "command", "page"], cells))
    assert "`brainloom store verify --deep`" in fitted
    assert link in fitted
    assert r"\|" in fitted


def test_long_cells_of_a_table_artifact_are_broken_between_words() -> None:
    assert fit_cell("label shape mismatch") == "label shape mismatch"
    lines = fit_cell("one word and another " * 6).split("\n")
    assert max(map(len, lines)) <= TABLE_CELL
    assert fit_cell("a" * 80) == "a" * 80
