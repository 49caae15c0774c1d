"""Embeddings: whole images, kept by content, refused where encoder and store do not fit; their picture."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from probe_phantoms import GM, NETWORK, write_encoder, write_workspace
from training_phantoms import DATASET, EXTENT, ORIGIN, SPEC, write_blobs

from models.config import NetworkConfig
from models.embed import embed_cases, embed_windows, tile_starts, window_size
from models.encoder import load_encoder
from models.export import NotFinishedError
from models.finished import write_settings
from models.recipes_brainmvp import TINY_NETWORK
from models.records import SelectedCase
from models.spec import SPECS, unlike_images
from models.store import Store, open_store
from tasks.embedding_figure import directions, embedding_figure
from tasks.embeddings import EmbeddingError, case_features, embeddings, random_encoder, trained_encoder

CASES = 5


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_workspace(tmp_path_factory.mktemp("embeddings"), cases=CASES)
    write_encoder(folder / "trainings" / "a", seed=1)
    return folder


@pytest.fixture(scope="module")
def store(workspace: Path) -> Store:
    return open_store(str(workspace / "store.zarr"))


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Store]:
    """Return a training on crops of 32^3 and a store of four modalities, where every third case lacks t1c."""
    folder = tmp_path_factory.mktemp("crops")
    write_blobs(str(folder / "store.zarr"), cases=3)
    training = write_encoder(folder / "brainmvp", 1, recipe="brainmvp_tiny", network=TINY_NETWORK, spec=SPEC)
    return training, open_store(str(folder / "store.zarr"))


def cases_of(store: Store) -> list[SelectedCase]:
    keys = ("dataset", "row", "case", "subject", "digest")
    return [SelectedCase(**{key: line[key] for key in keys}, role="test") for line in store.cases().to_pylist()]


def test_an_embedding_is_that_of_the_whole_image_on_the_grid(workspace: Path, store: Store) -> None:
    source = trained_encoder(workspace / "trainings" / "a")
    found, computed = embeddings(source, store, cases_of(store), "gm", workspace / "embeddings")
    assert (found.shape, found.dtype, computed) == ((CASES, 8), np.float32, CASES)
    image = np.zeros((1, 1, *GM.grid), np.float32)
    inside = tuple(slice(o, o + e) for o, e in zip(ORIGIN, EXTENT, strict=True))
    image[0, 0][inside] = store.dataset(DATASET).read_case(2)[0][0]
    with torch.no_grad():
        stages = load_encoder(workspace / "trainings" / "a")(torch.from_numpy(image))
    np.testing.assert_allclose(found[2], stages[-1].mean(dim=(2, 3, 4))[0].numpy(), rtol=1e-4, atol=1e-5)


def test_only_new_cases_are_computed_and_order_is_the_callers(workspace: Path, store: Store, tmp_path: Path) -> None:
    source, cases = trained_encoder(workspace / "trainings" / "a"), cases_of(store)
    told: list[tuple[int, int]] = []
    first, computed = embeddings(source, store, cases[:2], "gm", tmp_path)
    assert computed == 2
    again, computed = embeddings(source, store, cases[::-1], "gm", tmp_path, lambda *count: told.append(count))
    assert (computed, told) == (3, [(3, 3)])
    np.testing.assert_array_equal(again[::-1][:2], first)
    assert embeddings(source, store, cases, "gm", tmp_path)[1] == 0
    assert len(list(tmp_path.iterdir())) == 1


def test_random_encoders_are_a_function_of_their_seed(store: Store, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    one, other, again = (
        embeddings(random_encoder(NETWORK, seed), store, cases_of(store)[:2], "gm", tmp_path / str(k))[0]
        for k, seed in enumerate((0, 1, 0))
    )
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_kept_embeddings_that_cannot_be_read_are_computed_again(store: Store, tmp_path: Path) -> None:
    cases, source = cases_of(store)[:2], random_encoder(NETWORK, 0)
    first, _ = embeddings(source, store, cases, "gm", tmp_path)
    (path,) = tmp_path.glob("*.parquet")
    path.write_bytes(path.read_bytes()[:-20])
    again, fresh = embeddings(source, store, cases, "gm", tmp_path)
    assert fresh == 2
    np.testing.assert_array_equal(first, again)


def test_networks_of_fixed_strides_get_a_padded_window() -> None:
    assert window_size(NETWORK, (121, 145, 121)) == (121, 145, 121)
    assert window_size(NetworkConfig(), (121, 145, 121)) == (128, 160, 128)


def test_what_does_not_fit_is_refused(workspace: Path, store: Store, tmp_path: Path) -> None:
    cases = cases_of(store)[:1]
    with pytest.raises(
        NotFinishedError, match=r"nope has no done\.json: it is no finished training; run it to its end"
    ):
        trained_encoder(workspace / "trainings" / "nope")
    with pytest.raises(EmbeddingError, match=r"has no modality 't1'; its spec 'gm-blobs' has gm"):
        embeddings(random_encoder(NETWORK, 0), store, cases, "t1", tmp_path)
    two = random_encoder(NETWORK.replace(in_channels=2), 0)
    with pytest.raises(EmbeddingError, match=r"takes 2 channels, the probe gives 1 \(gm\)"):
        embeddings(two, store, cases, "gm", tmp_path)
    folder = write_encoder(tmp_path / "other", seed=1)
    source = trained_encoder(folder)
    assert source.spec is not None
    config_of = load_config(folder)
    write_settings(folder, config_of, GM.replace(percentiles=(1.0, 99.0)))
    with pytest.raises(
        EmbeddingError, match=r"differ in percentiles .*: an encoder is valid on images like its own only"
    ):
        embeddings(trained_encoder(folder), store, cases, "gm", tmp_path)
    assert unlike_images(GM, GM.replace(name="other", modalities=("gm", "t1"))) == ""
    assert unlike_images(SPECS["vbm_128"], SPECS["vbm"]) == ""
    assert unlike_images(SPECS["vbm"], SPECS["vbm_approximate"]) == "tissue"


def load_config(folder: Path):  # type: ignore[no-untyped-def]
    from models.finished import read_settings

    return read_settings(folder)[0]


def test_an_encoder_that_diverged_names_the_case(store: Store) -> None:
    class Broken(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
            return [image * torch.nan]

    with pytest.raises(ValueError, match="the embedding of case blobs/case-1 is not finite"):
        embed_cases(Broken(), store.dataset(DATASET), [1, 2], [0], (16, 16, 16))


def test_the_picture_shows_principal_components_and_grey_points_without_an_age() -> None:
    features = np.random.default_rng(0).standard_normal((20, 5))
    features[:, 0] *= 1e-15
    features[:, 1] = 5 * features[:, 2]
    points, shares = directions(features)
    assert abs(np.corrcoef(points[:, 0], features[:, 1])[0, 1]) > 0.9
    assert 0.4 < shares[0] < 0.8
    age = np.where(np.arange(20) < 3, np.nan, np.arange(20) + 30.0)
    png = embedding_figure({"AnatCL": features, "random encoder": features[:, ::-1]}, age, "Embeddings of toy")
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.width > 2 * picture.height * 0.8
    with pytest.raises(ValueError, match="embedding picture 'x': it needs features of three or more subjects, got 2"):
        embedding_figure({"a": features[:2]}, age[:2], "x")


def test_windows_cover_an_extent_evenly_and_a_short_axis_once() -> None:
    assert tile_starts((96, 40, 10), (48, 48, 48)) == [(0, -4, -19), (48, -4, -19)]
    assert [x for x, _, _ in tile_starts((100, 48, 48), (48, 48, 48))] == [0, 26, 52]


def test_an_encoder_trained_on_crops_sees_windows_and_each_modality_by_itself(
    crops: tuple[Path, Store], tmp_path: Path
) -> None:
    folder, store = crops
    source, cases = trained_encoder(folder), cases_of(store)
    assert source.window == (32, 32, 32)
    present = np.array([[True, k % 3 != 0] for k in range(3)])
    found = case_features(source, store, cases, ("t1", "t1c"), present, tmp_path)
    dim = (found.shape[1] - 1) // 2
    assert np.isnan(found[:, dim:-1]).all(axis=1).tolist() == [True, False, False]
    assert found[:, -1].tolist() == [0, 1, 1]
    dataset, encoder = store.dataset(DATASET), load_encoder(folder)
    starts = tile_starts(EXTENT, (32, 32, 32))
    assert len(starts) == 8
    with torch.no_grad():
        parts = [encoder(torch.from_numpy(dataset.read_crop(1, [2], one, (32, 32, 32))[None]))[-1] for one in starts]
    expected = np.mean([part.mean(dim=(2, 3, 4))[0].numpy() for part in parts], axis=0)
    np.testing.assert_allclose(found[1, dim:-1], expected, rtol=1e-4, atol=1e-5)
    whole = replace(source, window=None)
    assert not np.allclose(case_features(whole, store, cases, ("t1",), present[:, :1], tmp_path), found[:, :dim])
    nobody = np.zeros_like(present) | [True, False]
    assert case_features(source, store, cases, ("t1", "t1c"), nobody, tmp_path).shape == (3, dim)


def test_a_case_of_zeros_alone_is_embedded_from_one_window(crops: tuple[Path, Store]) -> None:
    folder, store = crops
    found = embed_windows(load_encoder(folder), store.dataset(DATASET), [0], [2], (32, 32, 32))
    with torch.no_grad():
        stages = load_encoder(folder)(torch.zeros(1, 1, 32, 32, 32))
    np.testing.assert_allclose(found[0], stages[-1].mean(dim=(2, 3, 4))[0].numpy(), rtol=1e-4, atol=1e-5)
