from __future__ import annotations

import pandas as pd
import pytest

from tasks.phenotypes import COLUMNS, combine, normalise, read_participants


def table(**columns):
    return pd.DataFrame(columns, dtype=object)


def test_spellings_meet_in_common_columns():
    a = normalise(table(participant_id=["s1"], AGE=["3"], Gender=["Female"], center=["x"], dx=["ad"]), "a")
    b = normalise(table(id=["s2"], age_at_scan=["4.5"], sex=["m"], site_id=["y"], group=["hc"]), "b")
    both = combine([b, a])
    assert list(both) == list(COLUMNS)
    assert both.to_numpy().tolist() == [["a", "s1", "", 3.0, "F", "x", "ad"], ["b", "s2", "", 4.5, "M", "y", "hc"]]


def test_a_second_spelling_keeps_its_name():
    found = normalise(table(participant_id=["s1"], diagnosis=["ad"], group=["1"]), "a")
    assert found.loc[0, ["diagnosis", "group"]].tolist() == ["ad", 1]


def test_numeric_sex_codes_are_not_guessed():
    assert normalise(table(subject=["s"], sex=["1"]), "a").loc[0, "sex"] == "1"


def test_rows_without_a_subject_are_dropped_and_words_as_ages_are_missing():
    found = normalise(table(subject=["s", None, " "], age=["old", "1", "2"]), "a")
    assert found["subject"].tolist() == ["s"]
    assert found["age"].isna().all()


def test_nothing_still_has_the_columns():
    assert list(combine([])) == list(COLUMNS)
    assert combine([])["age"].dtype == "float64"


def test_words_and_numbers_of_one_column_become_words():
    a = normalise(table(subject=["s"], iq=["100"]), "a")
    b = normalise(table(subject=["s"], iq=["high"]), "b")
    assert combine([a, b])["iq"].tolist() == ["100", "high"]


def test_a_table_without_subjects_is_refused(tmp_path):
    (tmp_path / "p.tsv").write_text("age\n3\n")
    with pytest.raises(ValueError, match=r"p\.tsv has no column of subject ids; expected one of participant_id"):
        read_participants(str(tmp_path / "p.tsv"), "a")
