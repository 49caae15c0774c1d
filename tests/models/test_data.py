"""Samples: the same for any number of loader processes, replayable, opened lazily."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_phantoms import EXTENT, ORIGIN, SPEC, small_config, write_blobs

from models.data import CaseDataset, collate, make_loader, to_device
from models.means import _spread, cached_training_means, training_means
from models.objectives import build_objective
from models.records import SelectedCase
from models.sampler import OrderedBatches, SampleKey, StreamBatches
from models.store import open_store


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[SelectedCase]]:
    url = str(tmp_path_factory.mktemp("data") / "blobs.zarr")
    return url, write_blobs(url)


def dataset(blobs: tuple[str, list[SelectedCase]], tmp_path: Path, role: Any = "train") -> CaseDataset:
    config = small_config(tmp_path, blobs[0])
    means = np.zeros((4, *SPEC.grid), np.float32)
    return CaseDataset(blobs[0], blobs[1], build_objective(config, SPEC, means).sampler(), role, seed=3)


def equal(one: dict[str, Any], two: dict[str, Any]) -> bool:
    assert one.keys() == two.keys()
    return all(
        torch.equal(a, two[key]) if isinstance(a, torch.Tensor) else bool(np.all(a == two[key]))
        for key, a in one.items()
    )


def test_batches_do_not_depend_on_the_number_of_loader_processes(
    blobs: tuple[str, list[SelectedCase]], tmp_path: Path
) -> None:
    cases = dataset(blobs, tmp_path)
    stream = StreamBatches(len(cases), 2, 1, 0, 3, 0, 5)
    # The store is read here first: a forked loader process would hang, a forkserver one does not.
    alone = list(make_loader(cases, stream, workers=0))
    together = list(make_loader(cases, stream, workers=2))
    assert len(alone) == len(together) == 5
    assert all(equal(a, b) for a, b in zip(alone, together, strict=True))


def test_on_a_gpu_batches_wait_in_pinned_memory_and_are_copied_without_waiting(
    blobs: tuple[str, list[SelectedCase]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What can be said of it without one."""
    loader = make_loader(dataset(blobs, tmp_path), [], 2, pin_memory=True)
    assert loader.pin_memory
    assert loader.persistent_workers
    assert loader.prefetch_factor == 2, "torch's default: two batches of each process are ready"
    assert loader.multiprocessing_context.get_start_method() == "forkserver"
    copied: list[bool] = []
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, device, non_blocking=False: copied.append(non_blocking) or self
    )
    to_device({"image": torch.zeros(2), "case": ["a", "b"]}, torch.device("cuda"))
    assert copied == [True]


def test_a_sample_depends_on_epoch_and_place_and_can_be_replayed(
    blobs: tuple[str, list[SelectedCase]], tmp_path: Path
) -> None:
    cases = dataset(blobs, tmp_path)
    key = SampleKey(epoch=1, position=2, case=0)
    assert equal(cases[key], dataset(blobs, tmp_path)[key])
    assert not equal(cases[key], cases[SampleKey(2, 2, 0)])
    assert cases[2]["case"] == cases[SampleKey(0, 2, 2)]["case"] == "case-2"


def test_validation_draws_are_the_same_in_every_epoch(blobs: tuple[str, list[SelectedCase]], tmp_path: Path) -> None:
    cases = dataset(blobs, tmp_path, "val")
    assert len(cases) == 1
    assert equal(cases[SampleKey(0, 0, 0)], cases[SampleKey(5, 0, 0)])


def test_making_a_loader_takes_no_number_from_the_global_generator(
    blobs: tuple[str, list[SelectedCase]], tmp_path: Path
) -> None:
    cases = dataset(blobs, tmp_path)
    before = torch.get_rng_state()
    next(iter(make_loader(cases, OrderedBatches(len(cases), 2, 1, 0), workers=0)))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_pickled_dataset_carries_no_open_store(blobs: tuple[str, list[SelectedCase]], tmp_path: Path) -> None:
    cases = dataset(blobs, tmp_path)
    assert cases[0]
    assert len(pickle.dumps(cases)) < 10_000
    assert equal(pickle.loads(pickle.dumps(cases))[0], cases[0])


def test_info_and_reader_give_the_stored_case(blobs: tuple[str, list[SelectedCase]], tmp_path: Path) -> None:
    cases = dataset(blobs, tmp_path)
    info, reader = cases.info(3), cases.reader(3)
    assert (info.case, info.subject, info.extent, info.origin) == ("case-3", "sub-3", EXTENT, ORIGIN)
    assert info.present == (True, True, False, True)
    assert info.target == "patient"
    outside = reader.read([1], (-8, 0, 0), (8, 8, 8))
    assert outside.shape == (1, 8, 8, 8)
    assert outside.dtype == np.float32
    assert not outside.any()
    assert reader.read_label((0, 0, 0), EXTENT).max() == 3


def test_collate_gives_tensors_lists_and_types() -> None:
    batch = collate([{"a": np.ones(2, np.float32), "n": i, "x": i / 2, "s": str(i)} for i in range(2)])
    assert batch["a"].shape == (2, 2)
    assert batch["n"].dtype == torch.int64
    assert batch["x"].dtype == torch.float32
    assert batch["s"] == ["0", "1"]
    assert to_device(batch, torch.device("cpu")) == batch


def test_samples_with_different_keys_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must have the same keys; \['b'\] differ"):
        collate([{"a": 1}, {"a": 1, "b": 2}])


def test_training_means_use_training_cases_and_present_modalities_only(
    blobs: tuple[str, list[SelectedCase]], tmp_path: Path
) -> None:
    store = open_store(blobs[0])
    train = [case for case in blobs[1] if case.role == "train"]
    means = training_means(store, train)
    expected = np.zeros((4, *SPEC.grid))
    counts = np.zeros(4)
    window = tuple(slice(o, o + e) for o, e in zip(ORIGIN, EXTENT, strict=True))
    for case in train:
        image, _ = store.dataset(case.dataset).read_case(case.row)
        present = store.dataset(case.dataset).case_info(case.row).present
        expected[(slice(None), *window)] += image
        counts += present
    assert counts.tolist() == [6, 6, 4, 6]
    np.testing.assert_allclose(means, expected / counts[:, None, None, None], atol=1e-6)
    assert np.array_equal(cached_training_means(tmp_path, store, train), means)
    kept = (tmp_path / "means.npz").stat().st_mtime_ns
    assert np.array_equal(cached_training_means(tmp_path, store, train), means)
    assert (tmp_path / "means.npz").stat().st_mtime_ns == kept
    assert not np.array_equal(cached_training_means(tmp_path, store, train[:2]), means)


def test_a_modality_that_no_case_has_gets_zeros(blobs: tuple[str, list[SelectedCase]]) -> None:
    store = open_store(blobs[0])
    means = training_means(store, [case for case in blobs[1] if case.row in (0, 3)])
    assert not means[2].any()
    assert means[1].any()


def test_a_rare_modality_is_averaged_over_its_own_cases() -> None:
    """A spread over all cases would see one of the two that have the second modality, or neither."""
    present = [[True, index in (1, 5)] for index in range(8)]
    assert _spread(present, 2, limit=2) == {0: [0], 4: [0], 1: [1], 5: [1]}
    assert _spread(present, 2, limit=100) == {i: [0, 1] if i in (1, 5) else [0] for i in range(8)}
    assert _spread([], 2, limit=2) == {}
