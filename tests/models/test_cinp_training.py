"""CINP in the loop: exact resume, what is logged and shown, frozen embeddings, cases that lack something."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cinp_cases import NETWORK, make_cinp_training, small_config
from connectome_stores import DATASET, SPEC, Made, write_store
from training_processes import done, losses

from models.config import OptimiserConfig
from models.data import CaseDataset
from models.distributed import World
from models.embed_networks import PairError, check_store, embed_connectomes, embed_images, embed_matrices, load_pair
from models.encoder import load_encoder
from models.export import NotFinishedError
from models.finished import read_training
from models.metrics import read_metrics
from models.objectives import build_objective
from models.objectives.base import CaseInfo
from models.objectives.cinp_samples import PairSampler
from models.recipes import RECIPES
from models.records import SelectedCase
from models.selection import write_selection
from models.state import start_training
from models.store import StoreError, open_store
from models.trainer import train, train_step
from tasks.embeddings import embeddings, trained_encoder
from tasks.weights_export import export_weights, formats_of

WORLD = World(0, 1, torch.device("cpu"))
Pairs = tuple[str, list[SelectedCase]]
PEOPLE = [
    *(Made(f"sub-{number}", network=number != 3) for number in range(7)),
    Made("sub-0", session="2"),
    *(Made(f"val-{number}", role="val") for number in range(3)),
]


class Killed(BaseException):
    """Stands for kill -9: nothing may be saved after it."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    url = str(tmp_path_factory.mktemp("pairs") / "pairs.zarr")
    return url, write_store(url, PEOPLE)


@pytest.fixture(scope="module")
def finished(pairs: Pairs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "a"
    train(make_cinp_training(folder, *pairs), folder, WORLD)
    return folder


@pytest.fixture(scope="module")
def images_alone(pairs: Pairs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "mae"
    train(make_cinp_training(folder, *pairs, recipe="image_mae_tiny", epochs=1), folder, WORLD)
    return folder


@pytest.mark.parametrize("asked", [3, pytest.param(5, marks=pytest.mark.full)])
def test_a_killed_training_ends_with_the_same_bits(pairs: Pairs, finished: Path, tmp_path: Path, asked: int) -> None:
    folder, calls = tmp_path / "a", iter(range(1000))
    config = make_cinp_training(folder, *pairs)

    def stop() -> bool:
        if next(calls) == asked:
            raise Killed
        return False

    with pytest.raises(Killed):
        train(config, folder, WORLD, stop)
    train(config, folder, WORLD)
    assert done(folder)["weights_digest"] == done(finished)["weights_digest"]
    assert losses(folder) == losses(finished)


def test_terms_temperature_and_counts_are_logged_and_pictures_shown(finished: Path, images_alone: Path) -> None:
    lines = [line["losses"] for line in read_metrics(finished) if line["kind"] == "train"]
    terms = {"loss", "loss_contrast", "loss_masking", "loss_matching"}
    assert all(set(line) == terms | {"temperature", "pairs", "matched"} for line in lines)
    assert {line["pairs"] for line in lines} <= {3.0, 4.0}
    assert lines[0]["temperature"] == pytest.approx(0.07)
    metrics = done(finished)["metrics"]
    assert terms | {"retrieval_image_to_network_top1", "matching_balanced", "embedding_rank", "feature_rank"} <= set(
        metrics
    )
    assert "feature_alignment" not in metrics
    assert metrics["retrieval_chance"] == pytest.approx(1 / 3)
    assert {path.name for path in (finished / "pictures").iterdir()} == {"masking.png", "pairs.png"}
    alone = [line["losses"] for line in read_metrics(images_alone) if line["kind"] == "train"]
    assert all(set(line) == {"loss", "loss_masking"} for line in alone)
    assert {path.name for path in (images_alone / "pictures").iterdir()} == {"masking.png"}


def test_matrices_are_decayed_and_the_rest_is_not() -> None:
    objective = build_objective(small_config(), SPEC)
    decayed, free = objective.parameter_groups(OptimiserConfig(weight_decay=0.05))
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.05, 0)
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    kept = {names[id(parameter)] for parameter in free["params"]}
    assert {"temperature", "decoder.mask_token", "network_encoder.cls", "network_encoder.region"} <= kept
    assert {"encoder.norm.weight", "encoder.patch_embed.bias"} <= kept
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    assert all(names[id(p)].endswith("weight") for p in decayed["params"])


def test_what_no_term_needs_is_not_built(finished: Path, images_alone: Path) -> None:
    parts = {name: {key.split(".")[0] for key in read_training(path).tensors}
             for name, path in (("pairs", finished), ("images", images_alone))}  # fmt: skip
    both = {"network_encoder", "image_projection", "network_projection", "temperature", "matching"}
    assert parts == {"pairs": {"encoder", "decoder", *both}, "images": {"encoder", "decoder"}}
    objective = build_objective(small_config(weight_masking=0.0, weight_matching=0.0), SPEC)
    assert {name.split(".")[0] for name, _ in objective.named_parameters()} == {"encoder", *both} - {"matching"}


def test_a_training_starts_from_one_on_images_alone(pairs: Pairs, images_alone: Path, tmp_path: Path) -> None:
    config = make_cinp_training(tmp_path / "a", *pairs, init_from=str(images_alone))
    state = start_training(config, tmp_path / "a", WORLD)
    tensors = read_training(images_alone).tensors
    assert all(torch.equal(value, state.objective.state_dict()[name]) for name, value in tensors.items())


def test_weights_of_networks_are_not_carried_over_to_other_connectomes(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert SPEC.connectome is not None
    other = SPEC.replace(connectome=SPEC.connectome.replace(kind="partial correlation"))
    url, folder = str(tmp_path / "other.zarr"), tmp_path / "a"
    chosen = write_store(url, [Made(f"sub-{number}") for number in range(4)], other)
    state = start_training(make_cinp_training(folder, url, chosen, init_from=str(finished)), folder, WORLD)
    assert "differ in kind from this store's: its weights of networks are not used" in caplog.text
    weights, mine = read_training(finished).tensors, state.objective.state_dict()
    same = {name for name, value in weights.items() if torch.equal(value, mine[name])}
    assert {name for name in weights if name.startswith(("encoder.", "decoder."))} <= same
    assert "network_encoder.cls" not in same


def test_the_encoder_is_fine_tuned_and_probed(pairs: Pairs, finished: Path, tmp_path: Path) -> None:
    cases = [case.replace(target=("control", "patient")[case.row % 2]) for case in pairs[1]]
    write_selection(tmp_path / "selection.parquet", cases)
    values = {"network": NETWORK, "crop": (16, 24, 24), "modalities": ("t1",), "init_from": str(finished)}
    config = RECIPES["classification_tiny"](pairs[0], str(tmp_path / "selection.parquet"), **values)
    state = start_training(config, tmp_path, WORLD)
    encoder, ours = load_encoder(finished).state_dict(), state.objective.encoder.state_dict()
    assert all(torch.equal(encoder[name], ours[name]) for name in encoder)
    assert np.isfinite(train_step(state, lambda: False).losses["loss"])
    dataset = state.dataset("val")
    assert state.objective.eval().predict(dataset.info(0), dataset.reader(0))["probabilities"].sum() == pytest.approx(1)
    with pytest.raises(ValueError, match="network 'vit3d' has no decoder, which objective 'segmentation' needs"):
        RECIPES["segmentation_tiny"](pairs[0], "s", **values)
    folder = tmp_path / "probed"
    train(make_cinp_training(folder, pairs[0], cases, epochs=1, probe_every=1), folder, WORLD)
    (line,) = [line for line in read_metrics(folder) if line["kind"] == "probe"]
    assert (line["n_train"], line["n_val"], line["measure"]) == (8, 3, "balanced accuracy")


@pytest.mark.full
def test_counterparts_of_unseen_people_are_found(tmp_path: Path) -> None:
    """Image and connectome share two traits: 1 of 16 by chance."""
    people = [Made(f"sub-{n}", role="val" if n >= 64 else "train") for n in range(80)]
    selection = write_store(str(tmp_path / "many.zarr"), people)
    network = NETWORK.replace(standardise="none")  # a z-score would take the traits away
    values = {"epochs": 30, "batch_size": 16, "lr": 2e-3, "network": network, "checkpoint_every": 1000}
    folder = tmp_path / "a"
    train(make_cinp_training(folder, str(tmp_path / "many.zarr"), selection, **values), folder, WORLD)
    metrics = done(folder)["metrics"]
    assert metrics["retrieval_chance"] == 1 / 16
    assert metrics["retrieval_image_to_network_top1"] >= 0.25
    assert metrics["retrieval_network_to_image_top1"] >= 0.25
    first, last = (losses(folder)[k][1]["loss_masking"] for k in (0, -1))
    assert last < 0.95 * first


# --- frozen use


def test_embeddings_of_pairs_do_not_depend_on_the_batch_and_are_normalised(pairs: Pairs, finished: Path) -> None:
    pair, stored = load_pair(finished), open_store(pairs[0]).dataset(DATASET)
    rows, told = [0, 1, 2, 4, 5, 6], list[int]()
    images, networks = embed_images(pair, stored, rows, told.append), embed_connectomes(pair, stored, rows)
    assert told == [4, 6]
    assert (images.features.shape, images.embeddings.shape) == ((6, 24), (6, 8))
    assert (networks.features.shape, networks.embeddings.shape) == ((6, 16), (6, 8))
    for found in (images, networks):
        assert np.linalg.norm(found.embeddings, axis=1) == pytest.approx(1, abs=1e-5)
    for k, row in enumerate(rows):
        assert embed_images(pair, stored, [row]).embeddings[0] == pytest.approx(images.embeddings[k], abs=1e-5)
        assert embed_connectomes(pair, stored, [row]).features[0] == pytest.approx(networks.features[k], abs=1e-5)
    config = small_config(store=pairs[0])
    objective = build_objective(config, SPEC)
    objective.load_state_dict(read_training(finished).tensors)
    cases = [case for case in pairs[1] if case.row in rows]
    dataset = CaseDataset(pairs[0], [case.replace(role="train") for case in cases], objective.sampler())
    batch = {name: torch.from_numpy(np.stack([dataset[i][name] for i in range(6)]))
             for name in ("image", "network", "identity", "paired")}  # fmt: skip
    with torch.no_grad():
        expected = objective.eval().encode_pairs(batch).encoded.embeddings
    assert images.embeddings == pytest.approx(expected[0].numpy(), abs=1e-5)
    assert networks.embeddings == pytest.approx(expected[1].numpy(), abs=1e-5)


def test_pooled_features_are_those_of_every_other_encoder(
    pairs: Pairs, finished: Path, images_alone: Path, tmp_path: Path
) -> None:
    store, cases = open_store(pairs[0]), pairs[1][:3]
    for folder in (finished, images_alone):
        found, computed = embeddings(trained_encoder(folder), store, cases, "t1", tmp_path)
        assert (found.shape, computed) == ((3, 24), 3)
    features = embed_images(load_pair(finished), store.dataset(DATASET), [0, 1, 2]).features
    assert embeddings(trained_encoder(finished), store, cases, "t1", tmp_path)[0] == pytest.approx(features, abs=1e-6)
    stages = load_encoder(finished)(torch.rand(1, 1, *NETWORK.image_size))
    assert stages[-1].shape == (1, 24, 2, 2, 3)


def test_connectomes_and_images_of_another_kind_are_refused(pairs: Pairs, finished: Path, images_alone: Path) -> None:
    pair, few = load_pair(finished), SPEC.connectome
    assert few is not None
    check_store(pair, SPEC.replace(grid=(40, 40, 40), connectome=few.replace(min_frames=50)), "s")
    for change, message in (
        ({"kind": "partial correlation"}, r"differ in kind \('correlation' and 'partial correlation'\); an encoder is"),
        ({"fisher_z": False}, r"differ in fisher_z \(True and False\)"),
        ({"atlas": "other"}, r"differ in atlas \('six' and 'other'\)"),
        ({"regions": tuple("abcdxf")}, r"differ in regions \(6 and 6 of them\)"),
    ):
        with pytest.raises(PairError, match=message):
            check_store(pair, SPEC.replace(connectome=few.replace(**change)), "s")
    with pytest.raises(PairError, match=r"differ in percentiles \(\(0\.5, 99\.5\) and \(1\.0, 99\.0\)\)"):
        check_store(pair, SPEC.replace(percentiles=(1.0, 99.0)), "s")
    with pytest.raises(PairError, match="s has no connectomes: its spec 'toy' asks for none"):
        check_store(pair, SPEC.replace(connectome=None), "s")
    with pytest.raises(
        PairError, match=r"embeds connectomes of 6 regions \(atlas 'six'\), got matrices of shape \(2, 5"
    ):
        embed_matrices(pair, np.zeros((2, 5, 5), np.float32))
    with pytest.raises(PairError, match="the embedding of connectome 1 is not finite"):
        embed_matrices(pair, np.stack([np.zeros((6, 6)), np.full((6, 6), np.inf)]).astype(np.float32))
    with pytest.raises(StoreError, match=r"case 'sub-3' of toy-connect .* has no connectome"):
        embed_connectomes(pair, open_store(pairs[0]).dataset(DATASET), [0, 3])
    with pytest.raises(PairError, match=r"was trained on images alone .*: it has no network encoder"):
        load_pair(images_alone)
    with pytest.raises(NotFinishedError):
        load_pair(images_alone.parent)


def test_exports_that_a_training_can_have(finished: Path, tmp_path: Path) -> None:
    why = formats_of(read_training(finished))
    assert {form for form, reason in why.items() if not reason} == {"safetensors", "monai-bundle"}
    assert (
        why["anatcl"] == "it was pre-trained with CINP, which released no weights; use `safetensors` or `monai-bundle`"
    )
    folder = export_weights(finished, tmp_path / "portable", "safetensors")
    assert load_pair(folder).weights == load_pair(finished).weights
    bundle = export_weights(finished, tmp_path / "bundle", "monai-bundle")
    described = json.loads((bundle / "configs/metadata.json").read_text())["network_data_format"]["inputs"]["image"]
    assert (described["spatial_shape"], described["channel_def"]) == (["8*n"] * 3, {"0": "t1"})


# --- cases that lack something


def start(folder: Path, people: list[Made], **changes: Any) -> Any:
    url = str(folder.with_suffix(".zarr"))
    return start_training(make_cinp_training(folder, url, write_store(url, people), **changes), folder, WORLD)


def test_cases_without_connectomes_are_told_with_what_becomes_of_them(
    pairs: Pairs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "a"
    state = start_training(make_cinp_training(folder, *pairs, weight_masking=0.0), folder, WORLD)
    assert "1 of 8 training cases have no connectome: they give no loss" in caplog.text
    assert "1 of 8 training cases have no connectome and, with weight_masking 0, no loss" in caplog.text
    assert np.isfinite(train_step(state, lambda: False).losses["loss"])


def test_stores_without_enough_connectomes_are_refused(tmp_path: Path) -> None:
    nobody = [Made(f"sub-{number}", network=False) for number in range(4)]
    with pytest.raises(
        ValueError, match=r"0 of 4 training cases have a connectome, of 0 people; .* \(recipe image_mae"
    ):
        start(tmp_path / "a", nobody)
    same = [Made("sub-0", session=str(number)) for number in range(4)]
    with pytest.raises(ValueError, match="4 of 4 training cases have a connectome, of 1 people"):
        start(tmp_path / "b", same)
    state = start(tmp_path / "c", nobody, recipe="image_mae_tiny")
    assert np.isfinite(train_step(state, lambda: False).losses["loss"])


class Matrix:
    """A reader of one connectome."""

    def __init__(self, matrix: np.ndarray) -> None:
        self.matrix = matrix

    def read(self, *window: Any) -> np.ndarray:
        return np.zeros((1, 2, 2, 2), np.float32)

    def read_connectome(self) -> np.ndarray:
        return self.matrix


def case(present: bool = True, has_connectome: bool = True) -> CaseInfo:
    return CaseInfo("d", 0, "c", "s", (present,), (2, 2, 2), (0, 0, 0), has_connectome=has_connectome)


def test_cases_that_cannot_be_used_are_refused_by_name() -> None:
    sampler = PairSampler("t1", 0, (2, 2, 2), (2, 2, 2), 8, 0.75, 4)
    with pytest.raises(ValueError, match="case d/c has no modality 't1'; leave it out of the selection"):
        sampler.draw(case(present=False), np.random.default_rng(0), True)
    draw = sampler.draw(case(), np.random.default_rng(0), True)
    assert json.loads(json.dumps(draw)) == draw
    assert len(draw["visible"]) == 2
    holes = np.full((4, 4), np.nan, np.float32)
    np.fill_diagonal(holes, 0)
    for matrix, message in (
        (np.zeros((5, 5)), r"case d/c has a connectome of shape \(5, 5\), the store's spec says 4 regions"),
        (holes, "case d/c has a connectome with 0 regions that are known, and 0 infinite values; 3 or more and none"),
        (np.full((4, 4), np.inf), "and 16 infinite values"),
    ):
        with pytest.raises(ValueError, match=message):
            sampler.load(case(), Matrix(matrix.astype(np.float32)), draw)  # type: ignore[arg-type]
    sample = sampler.load(case(has_connectome=False), Matrix(holes), draw)  # type: ignore[arg-type]
    assert (sample["paired"], sample["network"].any()) == (0, False)
