"""Who is probed: targets, cuts, seen subjects, shuffles, sites, layouts of closed data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from probe_phantoms import AD, AGE, CASES, people_of_blobs, write_workspace
from training_phantoms import DATASET

from models.records import SelectedCase
from models.store import Store, open_store
from tasks.benchmarks import BENCHMARKS, Benchmark
from tasks.folds import FoldError
from tasks.phenotype_layouts import LayoutError, layouts, read_layout, with_layouts
from tasks.probe_cohort import ProbeCohort, find_probe_cohort, seen_subjects, targets_of
from tasks.probe_sites import site_cohort
from tasks.probe_tasks import PROBES, TWINS, find_probe
from tasks.probes import ProbeError
from tasks.splits import people_of


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_workspace(tmp_path_factory.mktemp("probes"))


@pytest.fixture(scope="module")
def store(workspace: Path) -> Store:
    return open_store(str(workspace / "store.zarr"))


@pytest.fixture
def people(workspace: Path, store: Store) -> pd.DataFrame:
    return people_of(store.cases().to_pandas(), workspace)


LEFT_OUT = "Subjects left out because a pre-training of this table has seen them"


def as_seen(*subjects: tuple[str, str]) -> dict[tuple[str, str], str]:
    return dict.fromkeys(subjects, "the same id")


def cohort(benchmark: Benchmark, store: Store, people: pd.DataFrame, folder: Path, **more: object) -> ProbeCohort:
    return find_probe_cohort(benchmark, store, people, folder, **{"folds": 4, **more})  # type: ignore[arg-type]


def test_every_subject_is_in_one_fold_and_classes_are_spread(
    store: Store, people: pd.DataFrame, tmp_path: Path
) -> None:
    found = cohort(AD, store, people, tmp_path)
    assert [np.bincount(found.target[found.fold == k]).tolist() for k in range(4)] == [[3, 3]] * 4
    assert found.test_share == pytest.approx(1 / 3)
    ages = cohort(AGE, store, people, tmp_path)
    assert (
        ages.target.tolist() == people_of_blobs().set_index("subject")["age"][[c.subject for c in ages.cases]].tolist()
    )
    assert {path.name for path in (tmp_path / "splits").iterdir()} >= {
        "blobs-ad-4.folds.parquet",
        "blobs-age-4.folds.json",
    }


def test_seen_subjects_and_their_doubles_are_left_out(
    store: Store, people: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = {"dataset": DATASET, "digest": "x", "target": ""}
    selection = [
        SelectedCase(**line, row=k, case=f"case-{k}", subject=f"sub-{k}", role=role)
        for k, role in ((0, "train"), (1, "val"), (2, "test"))
    ]
    twins = [((DATASET, "sub-3"), (DATASET, "sub-0")), ((DATASET, "sub-1"), ("other", "x"))]
    monkeypatch.setattr("tasks.probe_cohort.person_links", lambda workspace, url: twins)
    seen = seen_subjects([selection], tmp_path, store.url)
    assert seen == {
        (DATASET, "sub-0"): "the same id",
        (DATASET, "sub-1"): "the same id",
        (DATASET, "sub-3"): f"looks like {DATASET}/sub-0",
        ("other", "x"): f"looks like {DATASET}/sub-1",
    }
    found = cohort(AD, store, people, tmp_path, seen=seen)
    assert len(found.cases) == CASES - 3
    assert found.notes == (f"{LEFT_OUT}: 3; see the table of leaks, whose .csv names them.",)
    assert list(found.leaks) == [(DATASET, "sub-0"), (DATASET, "sub-1"), (DATASET, "sub-3")]
    assert found.everyone is not None
    assert (found.everyone.benchmark.name, len(found.everyone.cases)) == ("blobs-ad-with-seen", CASES)
    folds = dict(zip(found.everyone.cases, found.everyone.fold.tolist(), strict=True))
    assert [folds[case] for case in found.cases] == found.fold.tolist(), "nobody moves"
    assert cohort(AD, store, people, tmp_path).everyone is None
    with pytest.raises(
        ProbeError, match=r"probe 'blobs-ad': all 24 subjects were seen by a pre-training; pre-train with"
    ):
        cohort(AD, store, people, tmp_path, seen=as_seen(*((DATASET, f"sub-{k}") for k in range(CASES))))


def test_whoever_looks_like_a_double_of_somebody_seen_is_seen(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = [((DATASET, "sub-5"), (DATASET, "sub-7")), ((DATASET, "sub-7"), ("other", "x")), (("a", "b"), ("a", "c"))]
    monkeypatch.setattr("tasks.probe_cohort.person_links", lambda workspace, url: chain)
    case = SelectedCase(dataset=DATASET, row=5, case="case-5", subject="sub-5", digest="x", role="train", target="")
    seen = seen_subjects([[case]], tmp_path, store.url)
    assert set(seen) == {(DATASET, "sub-5"), (DATASET, "sub-7"), ("other", "x")}


def test_people_seen_under_other_ids_are_refused_or_pointed_out(
    store: Store, people: pd.DataFrame, tmp_path: Path
) -> None:
    other = people.iloc[:2].assign(dataset="openbhb", also_in=[DATASET, "unknown"])
    with pytest.raises(ProbeError, match=r"probe 'blobs-ad': 1 subjects of the pre-training, first openbhb/sub-0, are"):
        cohort(AD, store, pd.concat([people, other]), tmp_path, seen=as_seen(("openbhb", "sub-0")))
    abide = people.assign(dataset="abide-i")
    benchmark = AD.replace(datasets=("abide-i",))
    found = cohort(benchmark, store, pd.concat([abide, other]), tmp_path / "abide", seen=as_seen(("openbhb", "sub-1")))
    assert "may be people of abide-i under other ids" in found.notes[0]


def test_people_whom_a_crosswalk_names_are_left_out_instead(store: Store, people: pd.DataFrame, tmp_path: Path) -> None:
    folder = tmp_path / "crosswalks"
    folder.mkdir()
    (folder / "openbhb.csv").write_text(f"person,dataset,subject\np,openbhb,b-0\np,{DATASET},sub-4\n")
    other = people.iloc[:1].assign(dataset="openbhb", subject="b-0", also_in=DATASET)
    case = SelectedCase(dataset="openbhb", row=0, case="b-0", subject="b-0", digest="x", role="train", target="")
    seen = seen_subjects([[case]], tmp_path, store.url)
    assert seen[DATASET, "sub-4"] == "the same person as openbhb/b-0 (crosswalk)"
    assert set(seen) == {("openbhb", "b-0"), (DATASET, "sub-4")}
    found = cohort(AD, store, pd.concat([people, other]), tmp_path, seen=seen)
    assert "sub-4" not in {one.subject for one in found.cases}
    assert found.notes[0].startswith(f"{LEFT_OUT}: 1;")


def test_missing_ages_are_left_out_and_counted(store: Store, people: pd.DataFrame, tmp_path: Path) -> None:
    people.loc[people["subject"].isin(["sub-4", "sub-9"]), "age"] = np.nan
    found = cohort(AGE, store, people, tmp_path)
    assert (len(found.cases), found.notes) == (22, ("Subjects left out for want of a usable value of 'age': 2 of 24.",))
    with pytest.raises(ProbeError, match=r"probe 'blobs-age': 1 ages, first -9999, are not from 0 to 130 years; corr"):
        cohort(AGE, store, people.assign(age=people["age"].where(people["subject"] != "sub-2", -9999)), tmp_path)
    people["age"] = np.nan
    nobody = cohort(AGE, store, people, tmp_path)
    assert nobody.notes == ("24 cases of blobs are stored, none has a usable value in column 'age'.",)
    elsewhere = cohort(PROBES["openbhb-age"], store, people, tmp_path)
    assert (elsewhere.cases, elsewhere.notes) == ((), ())


def test_cohorts_that_cannot_be_probed(store: Store, people: pd.DataFrame, tmp_path: Path) -> None:
    few = people[people["subject"].isin(["sub-0", "sub-1", "sub-2"])]
    with pytest.raises(FoldError, match="3 subjects are fewer than 4 folds"):
        cohort(AGE, store, few, tmp_path / "few")
    with pytest.raises(
        ProbeError, match=r"no unseen subject is 'ad-like' in column 'diagnosis'; there are 12 control;"
    ):
        cohort(AD, store, people[people["diagnosis"] == "control"], tmp_path / "absent")
    rare = people[(people["diagnosis"] == "control") | people["subject"].isin(["sub-1", "sub-3", "sub-5"])]
    with pytest.raises(ProbeError, match=r"class 'ad-like' \(3 subjects\) is absent from fold \d of 4; every fold"):
        cohort(AD, store, rare, tmp_path / "rare")


def test_kept_folds_that_leave_one_without_anybody_are_refused(
    store: Store, people: pd.DataFrame, tmp_path: Path
) -> None:
    first = cohort(AGE, store, people, tmp_path)
    tested = zip(first.cases, first.fold, strict=True)
    seen = as_seen(*((case.dataset, case.subject) for case, fold in tested if fold == 1))
    with pytest.raises(ProbeError, match=r"its 18 unseen subjects lie in 4 folds as 6, 0, 6, 6; every fold needs one"):
        cohort(AGE, store, people, tmp_path, seen=seen)
    few = people[people["subject"].isin([f"sub-{k}" for k in range(5)])]
    with pytest.raises(
        ProbeError, match=r"its 5 unseen subjects lie in 3 folds as 2, 2, 1; every fold needs one, and 4"
    ):
        cohort(AGE, store, few, tmp_path / "few", folds=3)


def test_sites_that_cannot_be_probed_cost_only_their_report(store: Store, people: pd.DataFrame, tmp_path: Path) -> None:
    found = cohort(AGE, store, people, tmp_path)
    at_b = people["site"] == "B"
    people["modalities"] = [["t1"] if b else list(has) for b, has in zip(at_b, people["modalities"], strict=True)]
    sites, words = site_cohort([found], people, tmp_path, 4, {})
    assert sites is None
    assert words.startswith("No site report: probe 'site': no unseen subject is 'B' in column 'site'")


def test_changed_folds_of_the_sites_cost_only_their_report(store: Store, people: pd.DataFrame, tmp_path: Path) -> None:
    found = cohort(AGE, store, people, tmp_path)
    sites, _ = site_cohort([found], people, tmp_path, 4, {})
    assert sites is not None
    path = tmp_path / "splits" / "site-4.folds.parquet"
    kept = pd.read_parquet(path)
    kept.assign(fold=(kept["fold"] + 1) % 4).to_parquet(path)
    sites, words = site_cohort([found], people, tmp_path, 4, {})
    assert sites is None
    assert words.startswith(f"No site report: {path}: the digest of the folds is ")


def test_several_sessions_count_once(store: Store, people: pd.DataFrame, tmp_path: Path) -> None:
    twice = people.assign(subject=[f"sub-{k // 2}" for k in range(CASES)])
    found = cohort(AGE, store, twice, tmp_path)
    assert len(found.cases) == CASES // 2
    assert found.cases[0].case == "case-0"


def test_a_negative_control_shuffles_inside_folds_anew_for_each_seed(
    store: Store, people: pd.DataFrame, tmp_path: Path
) -> None:
    found = cohort(AD.replace(shuffle_seed=1, control="negative"), store, people, tmp_path)
    first, second = found.of_seed(0), found.of_seed(1)
    assert found.of_seed(0).cases == first.cases != second.cases
    for fold in range(4):
        counts = [np.bincount(one.target[one.fold == fold]).tolist() for one in (found, first, second)]
        assert counts[0] == counts[1] == counts[2]
    plain = cohort(AD, store, people, tmp_path)
    assert plain.of_seed(3) is plain


def test_scores_become_classes_by_cuts_and_quantiles() -> None:
    people = pd.DataFrame({"aims_upper": ["0", "0.0", "2", "", None, "7"], "saps": [1, 2, 3, 4, None, 5.0]})
    assert targets_of(PROBES["schizconnect-aims-upper"], people).tolist() == ["none", "none", "any", None, None, "any"]
    halves = targets_of(PROBES["schizconnect-saps"], people).tolist()
    assert halves == ["lower half", "lower half", "lower half", "upper half", None, "upper half"]
    assert targets_of(PROBES["schizconnect-memory"], people).tolist() == [None] * 6


def test_sites_need_a_subject_in_every_fold(store: Store, people: pd.DataFrame, tmp_path: Path) -> None:
    found, words = site_cohort([cohort(AGE, store, people, tmp_path)], people, tmp_path, 4, {})
    assert found is not None
    assert (found.benchmark.classes, len(found.cases)) == (("A", "B"), 23)
    assert words == "Sites with fewer than 4 unseen subjects are left out of the site report: C (1)."
    assert "lower is better, chance is 0.500" in found.benchmark.note
    alone, words = site_cohort([cohort(AGE, store, people, tmp_path)], people, tmp_path, 20, {})
    assert alone is None
    assert words.startswith("No site report: it needs two sites with 20 unseen subjects each. Sites with")
    assert site_cohort([], people, tmp_path, 4, {}) == (None, "")


def test_the_registry_is_complete_and_says_how_sure_it_is() -> None:
    assert not set(PROBES) & set(BENCHMARKS)
    clinical = {name for name in PROBES if PROBES[name].cuts or PROBES[name].quantiles or "handedness" in name}
    assert len(clinical) == 10
    assert {PROBES[name].basis for name in clinical} == {"unverified"}
    twins = {one.name for one in TWINS}
    assert twins == {f"{name}-probe" for name, one in BENCHMARKS.items() if one.kind == "classification"}
    tasks = set(PROBES) - clinical - twins - {name for name in PROBES if name.startswith("phantom")}
    assert len(tasks) == 13, "AnatCL's twelve, and sMCI/pMCI, of which it is doubtful"
    sure = {name for name in tasks if PROBES[name].basis == "confirmed"}
    assert sure == {
        "openbhb-age", "oasis3-ad", "schizconnect-broad", "schizconnect-strict", "abide-asperger", "abide-pdd-nos",
    }  # fmt: skip
    assert {entry.value for entry in PROBES["openbhb-age"].published} == {2.55, 2.61}
    assert {PROBES[name].protocol for name in PROBES} == {"probe"}
    with pytest.raises(KeyError, match=r"unknown probe 'nope'; known: phantom-anat-age"):
        find_probe("nope")
    with pytest.raises(KeyError, match="'adni' is fine-tuned, its probe is 'adni-probe'; known: "):
        find_probe("adni")


def test_classifications_of_fine_tuning_are_probed_on_their_cases_and_classes() -> None:
    tuned, probed = BENCHMARKS["brats2018"], PROBES["brats2018-probe"]
    same = ("datasets", "modalities", "target", "classes", "basis", "kind", "control", "shuffle_seed")
    assert [getattr(probed, name) for name in same] == [getattr(tuned, name) for name in same]
    assert (probed.protocol, probed.metrics[0], probed.published) == ("probe", "auroc", ())
    assert "frozen encoders on cohort and classes of 'brats2018'; published numbers are of fine-tuning" in probed.note
    assert PROBES["phantom-shuffled-probe"].shuffle_seed == BENCHMARKS["phantom-shuffled"].shuffle_seed


def test_benchmarks_from_before_probes_have_their_digest_and_rules_hold() -> None:
    assert {"protocol", "cuts", "quantiles"}.isdisjoint(BENCHMARKS["adni"].model_dump())
    again = PROBES["schizconnect-aims-upper"].replace(title="x")
    assert (again.protocol, again.cuts) == ("probe", (0.0,))
    with pytest.raises(
        ValueError, match="regression benchmark 'phantom-anat-age' needs a target column and no classes"
    ):
        PROBES["phantom-anat-age"].replace(classes=("a", "b"))
    with pytest.raises(ValueError, match="2 classes need one rising cut fewer"):
        PROBES["schizconnect-aims-upper"].replace(cuts=(1.0, 0.0))
    with pytest.raises(ValueError, match="are for protocol 'probe' only"):
        PROBES["phantom-anat-age"].replace(protocol="fine-tune")
    with pytest.raises(ValueError, match="predicts no segmentation"):
        BENCHMARKS["phantom-tumour"].replace(protocol="probe")


def test_layouts_fill_our_columns_from_those_of_a_dataset(tmp_path: Path) -> None:
    assert set(layouts()) == {"abide-i", "adhd-200", "adni", "oasis3", "schizconnect", "srpbs"}
    assert {layouts()[name].basis for name in ("adni", "oasis3", "schizconnect", "srpbs")} == {"unverified"}
    people = pd.DataFrame(
        {
            "dataset": ["abide-i", "abide-i", "adni", "adni", "toy"],
            "DSM_IV_TR": [0.0, 2.0, np.nan, np.nan, np.nan],
            "diagnosis": ["1", "2", "cn", "Dementia", "as is"],
            "PTGENDER": ["", "", "Male", "Female", ""],
            "sex": ["1", "2", "", "", "M"],
        }
    )
    found = with_layouts(people)
    assert found["dsm_iv"].tolist()[:2] == ["HC", "Asperger"]
    assert found["diagnosis"].tolist() == ["autism", "HC", "HC", "AD", "as is"]
    assert found["sex"].tolist() == ["M", "F", "M", "F", "M"]
    own = tmp_path / "adni.yaml"
    own.write_text(
        "dataset: adni\nbasis: confirmed\ncolumns:\n  diagnosis: {from: [diagnosis], values: {cn: healthy}}\n"
    )
    assert with_layouts(people, [read_layout(own)])["diagnosis"].tolist()[2:4] == ["healthy", None]
    own.write_text("dataset: adni\ncolumns: {}\n")
    with pytest.raises(LayoutError, match=r"adni\.yaml is no layout \(dataset, basis, columns"):
        read_layout(own)
    with pytest.raises(LayoutError, match=r"nope\.yaml is not a file; correct `layouts`"):
        read_layout(tmp_path / "nope.yaml")
