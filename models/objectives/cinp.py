"""CINP: image-network contrast, masked image modelling and network-image matching.

Source: Hu, Wang, Xiao, "Learning 3D Medical Image Models From Brain Functional Connectivity Network Supervision For
Mental Disorder Diagnosis" (MICCAI 2025, arXiv 2503.04205). No code was released and much is unsaid; what is confirmed
and what is chosen is in docs/cinp.md. The pair losses are ALBEF's, the masked images those of MAE.

    L = weight_contrast INC + weight_masking MIM + weight_matching NIM

INC and NIM are of the pairs of a batch, cases with an image and a connectome; MIM is of all cases. Sessions of one
person are no negatives of each other. A batch with fewer than two pairs has an INC of 0, and one without pairs of two
people an NIM of 0; `pairs` and `matched` count them in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from models.config import OptimiserConfig, TrainingConfig
from models.config_cinp import CINPConfig
from models.networks.connectome import build_network_encoder
from models.networks.matching import Matching
from models.networks.vit import EPS, MaskedDecoder, ViT3D, patch_grid, patches
from models.objectives.base import Batch, CaseInfo, Clock, Metrics, sum_and_count
from models.objectives.cinp_momentum import SlowPair, soft_contrast
from models.objectives.cinp_samples import PairSampler, patches_of
from models.objectives.cinp_views import pair_metrics, reconstructions, similarity_matrix
from models.objectives.contrast import alone, gather, identity_of, ranks
from models.objectives.matching import Candidates, Pairs, contrast, encode_both, hard_negatives, triples
from models.objectives.whole_map import WholeMap
from models.records import SelectedCase
from models.spec import PreprocessSpec

log = logging.getLogger(__name__)

# Confirmed are the three losses alone; with both presets all other values are defaults of the reconstruction.
PRESETS: dict[str, CINPConfig] = {"paper": CINPConfig(), "recommended": CINPConfig()}
"""Named values of the objective; the presets of the recipes differ in the size of the image."""
TERMS = ("masking", "contrast", "matching")
"""Names of the loss terms and of their weights in the config."""


class CINP(WholeMap):
    """Image encoder and decoder, network encoder, two projections, temperature, matching; what no term needs is absent.

    Raises ValueError for a store without the modality or without connectomes, an image size without patches, and pairs
    of one case.
    """

    encoder: ViT3D

    def __init__(
        self, config: TrainingConfig, spec: PreprocessSpec, training_means: NDArray[np.float32] | None = None
    ) -> None:
        settings, width = config.objective, config.network.feature_dim
        if not isinstance(settings, CINPConfig):
            raise TypeError(f"CINP needs a CINPConfig, got {type(settings).__name__}")
        super().__init__(config, settings.modality, spec)
        self.settings = settings
        self.patches = patches_of(self.size, self.encoder.config.patch, settings.mask_rate)
        self.regions = _regions(settings, spec)
        if settings.weight_masking:
            sizes = (settings.decoder_width, settings.decoder_depth, settings.decoder_heads)
            self.decoder = MaskedDecoder(self.encoder.config, *sizes)
        if settings.uses_networks:
            _check_cases(settings, config.data.batch_size, config.world_size)
            self.network_encoder = build_network_encoder(settings.network_encoder, self.regions)
            self.image_projection = nn.Linear(width, settings.embedding_dim)
            self.network_projection = nn.Linear(settings.network_encoder.width, settings.embedding_dim)
            self.temperature = nn.Parameter(torch.tensor(settings.temperature))
        if settings.weight_matching:
            self.matching = Matching(settings.network_encoder, width, settings.matching_depth)
        self.slow = SlowPair(self, settings) if settings.momentum else None
        self.per_step = config.world_size * config.data.batch_size * config.accumulation
        self.cases = 0
        if settings.queue % self.per_step:
            raise ValueError(
                f"queue must be a multiple of the {self.per_step} cases of an optimiser step, got {settings.queue}; "
                f"use {-(-settings.queue // self.per_step) * self.per_step}"
            )

    def fit(self, store: Any, train: Sequence[SelectedCase]) -> None:
        """Count the pairs, and the cases for the rise of soft targets.

        Raises ValueError when fewer than two people have image and connectome, where a term needs them.
        """
        self.cases = len(train)
        if not self.settings.uses_networks:
            return
        opened = {name: store.dataset(name) for name in {case.dataset for case in train}}
        paired = [case for case in train if opened[case.dataset].has_connectome(case.row)]
        people = {identity_of(case.dataset, case.subject, case.person) for case in paired}
        if len(people) < 2:
            raise ValueError(
                f"{len(paired)} of {len(train)} training cases have a connectome, of {len(people)} people; contrast "
                "and matching need pairs of two or more people: add functional images or time series to the catalog "
                "and preprocess again, or pre-train on images alone (recipe image_mae)"
            )
        if missing := len(train) - len(paired):
            use = "they feed the masking alone" if self.settings.weight_masking else "they give no loss"
            log.warning("%d of %d training cases have no connectome: %s", missing, len(train), use)

    def sampler(self) -> PairSampler:
        """Return what reads images and connectomes."""
        where = (self.modality, self.channel, self.spec.grid, self.size)
        return PairSampler(*where, self.patches, self.settings.mask_rate, self.regions)

    def idle_terms(self, cases: Sequence[CaseInfo]) -> list[str]:
        """Say how many cases give no loss at all."""
        unpaired = sum(not case.has_connectome for case in cases)
        if not unpaired or self.settings.weight_masking:
            return []
        return [f"{unpaired} of {len(cases)} training cases have no connectome and, with weight_masking 0, no loss"]

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """Return the weighted sum `loss`, its terms, and `temperature`, `pairs` and `matched` of the global batch.

        Raises ValueError when the ranks at hand are too few to compare a case with another one.
        """
        if self.settings.uses_networks:
            _check_cases(self.settings, len(batch["paired"]), ranks())
            with torch.no_grad():  # the optimiser may have led it out of its bounds
                self.temperature.copy_(self.heat)
        terms, counts = self.terms(batch, self.settings.gather_negatives, clock)
        return {"loss": self._sum(terms), **{f"loss_{name}": term.detach() for name, term in terms.items()}, **counts}

    def _sum(self, terms: dict[str, Tensor]) -> Tensor:
        weighted = [getattr(self.settings, f"weight_{name}") * term for name, term in terms.items()]
        return torch.stack(weighted).sum() if weighted else torch.zeros(())

    @property
    def heat(self) -> Tensor:
        """Return the temperature inside its bounds. It is float32, under autocast too."""
        return self.temperature.clamp(self.settings.temperature_min, self.settings.temperature_max)

    def terms(self, batch: Batch, across_ranks: bool, clock: Clock) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the loss terms by name (masking, contrast, matching), without their weights, and what is counted."""
        found: dict[str, Tensor] = {}
        if self.settings.weight_masking:
            found["masking"] = self.masked_errors(batch).mean()
        if not self.settings.uses_networks:
            return found, {}
        pairs = self.encode_pairs(batch, across_ranks)
        known, logits = pairs.candidates, self.logits(pairs.encoded.embeddings, pairs.everyone)
        if self.slow is None:
            losses = torch.stack([contrast(one, known) for one in logits])
            found["contrast"] = known.mean(losses.mean(0), known.contrasted)
        else:
            found["contrast"] = self.slow_contrast(self.slow, batch, pairs, clock)
        counts = {"temperature": self.heat.detach(), "pairs": known.paired.sum().float()}
        if self.settings.weight_matching:
            errors = F.cross_entropy(*self.match(pairs, logits, batch["pick"]), reduction="none")
            found["matching"] = known.mean(errors.view(3, -1).mean(0), known.matched)
            counts["matched"] = known.matched.sum().float()
        return found, counts

    def slow_contrast(self, slow: SlowPair, batch: Batch, pairs: Pairs, clock: Clock) -> Tensor:
        """Return INC with candidates and soft targets of the momentum encoders; the queue moves on."""
        slow.follow(self, clock.step)
        with torch.no_grad():
            own = encode_both(slow, batch).embeddings
            everyone = pairs.join(own).transpose(0, 1).flatten(1, 2)
            candidates, wide = slow.with_queue(everyone, pairs.candidates)
            teacher = self.logits(own, candidates)
        share = self.settings.soft_targets * min(1.0, clock.step * self.per_step / max(1, self.cases))
        logits = self.logits(pairs.encoded.embeddings, candidates)
        losses = [soft_contrast(one, aim, wide, share) for one, aim in zip(logits, teacher, strict=True)]
        slow.push(everyone, pairs.candidates)
        counted = wide.contrasted[: len(pairs.candidates.identity)]
        return wide.mean(torch.stack(losses).mean(0), counted)

    # --- masked image modelling

    def masked_errors(self, batch: Batch) -> Tensor:
        """Return the mean squared error (B,) over the voxels of the patches that the encoder did not see."""
        predicted, target, hidden = self.reconstruct(batch)
        errors = (predicted - target).square().mean(2)
        return (errors * hidden).sum(1) / hidden.sum(1)

    def reconstruct(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return predicted and true patches (B, N, V), float32, and which were hidden (B, N)."""
        image, places = batch["image"][:, None], batch["visible"]
        patch = self.encoder.config.patch
        tokens = self.encoder.tokens(image)
        seen = tokens.gather(1, places[:, :, None].expand(-1, -1, tokens.shape[2]))
        predicted = self.decoder(self.encoder.encode(seen), places, patch_grid(image, patch)).float()
        target = patches(self.encoder.standardised(image), patch)
        if self.settings.normalise_patches:
            mean, variance = target.mean(2, keepdim=True), target.var(2, keepdim=True, correction=0)
            target = (target - mean) / (variance + EPS).sqrt()
        hidden = torch.ones(target.shape[:2], dtype=torch.bool, device=target.device).scatter(1, places, False)
        return predicted, target, hidden

    # --- pairs

    def encode_pairs(self, batch: Batch, across_ranks: bool = False) -> Pairs:
        """Encode images (unmasked) and connectomes; `across_ranks` takes the cases of all ranks as candidates."""
        encoded, join = encode_both(self, batch), gather if across_ranks else alone
        identity, paired = join(torch.stack([batch["identity"], batch["paired"]])).transpose(0, 1).flatten(1)
        everyone = join(encoded.embeddings).transpose(0, 1).flatten(1, 2)
        count = len(encoded.image)
        first = count * (dist.get_rank() if across_ranks and ranks() > 1 else 0)
        me = first + torch.arange(count, device=identity.device)
        known = Candidates(identity, paired.bool(), me, ranks() if across_ranks else 1)
        return Pairs(encoded, everyone, known, join)

    def logits(self, mine_2BD: Tensor, candidates_2GD: Tensor) -> Tensor:
        """Return cosine / temperature (2, B, G), float32, of images to networks and of networks to images."""
        with torch.autocast(mine_2BD.device.type, enabled=False):
            return mine_2BD @ candidates_2GD.flip(0).transpose(1, 2) / self.heat

    def match(self, pairs: Pairs, logits: Tensor, pick_B2: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (3B, 2) and classes of the pairs, of their images with a hard negative network, and of their
        networks with a hard negative image."""
        drawn = [hard_negatives(one, pairs.candidates, pick_B2[:, k]) for k, one in enumerate(logits)]
        network, absent, image = triples(pairs, self.matching.image_tokens(pairs.encoded.image), *drawn)
        target = torch.zeros(len(image), dtype=torch.int64, device=image.device)
        target[: len(pick_B2)] = 1
        return self.matching(network, absent, image), target

    # --- looks

    @torch.no_grad()
    def validate(self, batch: Batch, clock: Clock) -> Metrics:
        """Return the loss and its terms within the batch, retrieval, matching accuracy, and collapse metrics."""
        found: Metrics = {}
        if self.settings.weight_masking:
            found["loss_masking"] = sum_and_count(self.masked_errors(batch))
        if not self.settings.uses_networks:
            total, count = found["loss_masking"]
            return found | {"loss": (self.settings.weight_masking * total, count)}
        pairs = self.encode_pairs(batch)
        logits = self.logits(pairs.encoded.embeddings, pairs.everyone)
        matched = self.match(pairs, logits, batch["pick"]) if self.settings.weight_matching else None
        found |= pair_metrics(pairs, logits, matched)
        means = {name: found[f"loss_{name}"] for name in TERMS if f"loss_{name}" in found}
        loss = self._sum({name: total / count for name, (total, count) in means.items()})
        cases = torch.tensor(float(len(batch["image"])), device=loss.device)
        return found | {"loss": (loss * cases, cases)}

    @torch.no_grad()
    def pictures(self, batch: Batch, clock: Clock) -> dict[str, NDArray[np.uint8]]:
        """Return `masking` (input, what the encoder saw, output) and `pairs` (cosines of images and networks)."""
        found: dict[str, NDArray[np.uint8]] = {}
        if self.settings.weight_masking:
            found["masking"] = reconstructions(self, batch)
        if self.settings.uses_networks and int(batch["paired"].sum()) > 1:
            found["pairs"] = similarity_matrix(self.encode_pairs(batch))
        return found

    # --- weights

    def parameter_groups(self, optimiser: OptimiserConfig) -> list[dict[str, Any]]:
        """Return two groups: matrices, and what is not decayed: biases, norms, learned tokens, the temperature."""
        free = ("temperature", "mask_token", "network_encoder.cls", "network_encoder.region")
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            groups[parameter.dim() > 1 and not name.endswith(free)].append(parameter)
        return [
            {"name": name, "params": groups[decayed], "lr": optimiser.lr, "weight_decay": decay}
            for name, decayed, decay in (("matrices", True, optimiser.weight_decay), ("others", False, 0.0))
        ]

    def exports(self) -> dict[str, Tensor]:
        """Return all weights but the momentum encoders and their queue; the temperature is inside its bounds."""
        found = {name: value for name, value in super().exports().items() if not name.startswith("slow.")}
        return {**found, "temperature": self.heat.detach().cpu()} if self.settings.uses_networks else found

    def load_pretrained(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Copy what fits (see `Objective.load_pretrained`); the momentum encoders start from it."""
        loaded = super().load_pretrained(tensors)
        if self.slow is not None:
            self.slow.become(self)
        return loaded


def _regions(settings: CINPConfig, spec: PreprocessSpec) -> int:
    """Return how many regions the store's connectomes have; 0 when no term needs them."""
    if not settings.uses_networks:
        return 0
    if spec.connectome is None:
        raise ValueError(
            f"the store has no connectomes: its spec {spec.name!r} does not ask for them; preprocess with a spec that "
            "has `connectome` (cinp), or pre-train on images alone (recipe image_mae)"
        )
    return len(spec.connectome.regions)


def _check_cases(settings: CINPConfig, cases: int, on_ranks: int) -> None:
    on_ranks = on_ranks if settings.gather_negatives else 1
    if cases * on_ranks < 2:
        raise ValueError(
            f"contrast and matching compare a case with others, so a micro-batch needs at least 2, got {cases} on "
            f"{on_ranks} rank; raise batch_size or the number of ranks"
        )
