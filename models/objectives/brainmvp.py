"""BrainMVP: cross-modal reconstruction, modality template distillation and modality-aware contrast.

Source: Rui et al., "Multi-modal Vision Pre-training for Medical Image Analysis", CVPR 2025 (arXiv 2410.10604), and its
code. Of a case, one modality m is the target x_m and another one, n, is mixed in. Two views of one crop:

    view 1 (distillation):     masked blocks of x_m replaced by the learned template T_m
    view 2 (reconstruction):   masked blocks of x_m replaced by x_n; by T_m in the first `template_view2_epochs`

One encoder-decoder pass over both; the target of both is the unmasked x_m, mean squared error over the whole crop.
InfoNCE pulls the two views' stage-4 features together, from `contrast_from_epoch` on.

Unlike the reference: m and n are drawn per sample, not per batch; a case with one modality takes part in distillation
and contrast (its view 2 uses the template) and not in cross-modal reconstruction; images of one person (other sessions,
other datasets) are not each other's negatives.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from models.config import BrainMVPConfig, OptimiserConfig, TrainingConfig
from models.masking import block_grid, draw_mask, to_voxels
from models.networks.build import build_encoder, build_pretraining_decoder
from models.objectives.base import Batch, CaseInfo, Clock, Metrics, Objective, Reader, draw_start, sum_and_count
from models.objectives.brainmvp_checks import check_candidates, check_config, idle_terms, phases_out_of_reach
from models.objectives.contrast import collapse_metrics, identity_of, info_nce
from models.objectives.crops import usable_modalities
from models.objectives.pictures import middle_slice, montage
from models.records import MODALITIES
from models.spec import PreprocessSpec
from models.template import TemplateBank, cut

log = logging.getLogger(__name__)

PRESETS: dict[str, BrainMVPConfig] = {
    # The paper's text; what it leaves open is taken from the code, negatives from all ranks are our choice.
    "paper": BrainMVPConfig(),
    # The values of the released script, 10 : 1 : 1, the template in both views for 301 epochs.
    "code": BrainMVPConfig(
        mask_rate=0.8,
        weight_distillation=10.0,
        template_view2_epochs=301,
        gather_negatives=False,
    ),
    # Ours. Templates start at the training mean: from zero, their first gradient is 1e3 too large and Adam remembers it
    # for 1e4 steps, so the reference waits 1000 epochs for them. With good templates the contrast can start at once.
    # The paper's contrast (T = 1, no projector, 2 negatives) lies between 0.37 and 1.10 and gives almost no signal: a
    # projector keeps invariance out of the features, T = 0.1 is the class default of the code. InfoNCE (about 1) is 10
    # to 100 times the squared error of images in [0, 1], so at weight 1 it would hide the reconstruction. The decoder
    # modulates the template, so that the network learns what is special to a subject and the template stays the
    # average; one head per modality spares it to guess from a few visible blocks which contrast is wanted; skips let
    # fine structure through (docs/decisions/0003).
    "recommended": BrainMVPConfig(
        weight_contrast=0.02,
        contrast_from_epoch=0,
        temperature=0.1,
        projector_dim=128,
        template_init="mean",
        template_gain=True,
        modality_heads=True,
        decoder_skips=True,
    ),
}
"""Named values of the objective: the paper's, the released code's and ours."""

START_GAIN = 0.7
"""Of the template at the start. What the network adds later is about as good a guess as the template, so neither should
have all the weight; on a development cohort 0.7 ended above 0.4 and 1."""


@dataclass(frozen=True)
class BrainMVPSampler:
    """Draws target and other modality, crop and two masks per case."""

    modalities: tuple[str, ...]
    """Channel order of the store."""
    crop: tuple[int, int, int]
    block: int
    rate: float

    def draw(self, case: CaseInfo, rng: np.random.Generator, train: bool) -> dict[str, Any]:
        """Return channel indices, crop start and mask seeds. Raises ValueError for a case without a usable modality."""
        usable = usable_modalities(case, self.modalities)
        order = [usable[i] for i in rng.permutation(len(usable))]
        return {
            "target": order[0],
            "other": order[1] if len(order) > 1 else order[0],
            "start": draw_start(case.extent, self.crop, rng),
            "mask_seeds": [int(seed) for seed in rng.integers(2**63, size=2)],
        }

    def load(self, case: CaseInfo, reader: Reader, draw: Mapping[str, Any]) -> dict[str, Any]:
        """Return the two images (2, x, y, z), the two block masks and where the crop lies in the template."""
        grid = block_grid(self.crop, self.block)
        target, other = draw["target"], draw["other"]
        images = reader.read((target,) if other == target else (target, other), draw["start"], self.crop)
        masks = [draw_mask(grid, self.rate, np.random.default_rng(seed)) for seed in draw["mask_seeds"]]
        return {
            "image": np.stack([images[0], images[-1]]),
            "mask": np.stack(masks),
            "template": MODALITIES.index(self.modalities[target]),
            "template_start": np.add(case.origin, draw["start"]).astype(np.int64),
            "cross": int(other != target),
            "identity": identity_of(case.dataset, case.subject, case.person),
        }


class Projector(nn.Module):
    """Mean over positions, then two linear layers with GELU between."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, dim)
        self.fc2 = nn.Linear(dim, out)

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        """(B, C, D, H, W) -> (B, out)."""
        return self.fc2(F.gelu(self.fc1(x_BCDHW.mean(dim=(2, 3, 4)))))


@dataclass(frozen=True)
class Views:
    """Two views of a batch and what the network made of them. Images are (B, x, y, z)."""

    target: Tensor
    mask: Tensor
    """(B, 2, x, y, z), True where a voxel is replaced."""
    mixed: tuple[Tensor, Tensor]
    restored: tuple[Tensor, Tensor]
    errors: tuple[Tensor, Tensor]
    """Mean squared error of each sample (B,)."""
    embeddings: tuple[Tensor, Tensor]
    """L2-normalised (B, D)."""


class BrainMVP(Objective):
    """Encoder, pre-training decoder, template bank and, when asked for, a projector.

    Raises ValueError for a config that cannot work: more than one input channel, a crop that is not made of whole
    blocks, mean templates without means, contrast with one case.
    """

    def __init__(
        self, config: TrainingConfig, spec: PreprocessSpec, training_means: NDArray[np.float32] | None = None
    ) -> None:
        super().__init__()
        settings = config.objective
        if not isinstance(settings, BrainMVPConfig):
            raise TypeError(f"BrainMVP needs a BrainMVPConfig, got {type(settings).__name__}")
        check_config(config, settings, training_means is not None)
        for phase in phases_out_of_reach(settings, config.epochs):
            log.warning("training %s has %d epochs: %s", config.name, config.epochs, phase)
        self.settings = settings
        self.crop = config.data.crop
        self.modalities = spec.modalities
        self.encoder = build_encoder(config.network)
        self.heads = len(MODALITIES) if settings.modality_heads else 1
        outputs = self.heads * (2 if settings.template_gain else 1)
        self.decoder = build_pretraining_decoder(config.network, outputs, settings.decoder_skips)
        if settings.template_gain:
            _start_at_template(self.decoder.head, self.heads)
        self.template = TemplateBank(spec.grid, sparse=True)
        dim = config.network.feature_dim
        self.projector = Projector(dim, settings.projector_dim) if settings.projector_dim else None
        self.means: Tensor | None
        self.register_buffer("means", None, persistent=False)
        if training_means is not None:
            means = _in_template_order(training_means, spec)
            self.means = torch.from_numpy(means)
            if settings.template_init == "mean":
                self.template.start_from(means)

    def sampler(self) -> BrainMVPSampler:
        """Return what draws crops, modalities and masks."""
        return BrainMVPSampler(self.modalities, self.crop, self.settings.mask_block, self.settings.mask_rate)

    def idle_terms(self, cases: Sequence[CaseInfo]) -> list[str]:
        """Say so when no case has two modalities, or all are of one person."""
        return idle_terms(self.settings, self.modalities, cases)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """Return the weighted sum `loss` and its terms.

        The contrast is computed in every epoch, with weight 0 before its own, so that all parameters always take part
        (DDP) and its curve is complete. Raises ValueError when the ranks at hand are too few to give it a negative.
        """
        check_candidates(self.settings, len(batch["identity"]))
        views = self._views(batch, template_in_both=clock.epoch < self.settings.template_view2_epochs)
        terms = self._terms(views, batch, clock, across_ranks=self.settings.gather_negatives)
        weights = self.weights(clock.epoch)
        loss = torch.stack([weights[name] * terms[name] for name in weights]).sum()
        return {"loss": loss, **{name: value.detach() for name, value in terms.items()}}

    def weights(self, epoch: int) -> dict[str, float]:
        """Return the weight of each loss term in an epoch."""
        settings = self.settings
        return {
            "loss_reconstruction": settings.weight_reconstruction,
            "loss_distillation": settings.weight_distillation,
            "loss_contrast": settings.weight_contrast if epoch >= settings.contrast_from_epoch else 0.0,
        }

    def _terms(self, views: Views, batch: Batch, clock: Clock, across_ranks: bool) -> dict[str, Tensor]:
        everyone = clock.epoch < self.settings.template_view2_epochs
        errors = views.errors[1] if everyone else views.errors[1] * batch["cross"]
        one, two = views.embeddings
        return {
            # Over all cases, those without a cross-modal term too: a case counts the same in any rank and micro-batch.
            "loss_reconstruction": errors.mean(),
            "loss_distillation": views.errors[0].mean(),
            "loss_contrast": info_nce(one, two, batch["identity"], self.settings.temperature, across_ranks),
        }

    def _views(self, batch: Batch, template_in_both: bool) -> Views:
        target, other = batch["image"][:, 0], batch["image"][:, 1]
        mask = to_voxels(batch["mask"], self.settings.mask_block)
        template = self.template(batch["template"], batch["template_start"], self.crop)
        cross = batch["cross"].bool()[:, None, None, None] & (not template_in_both)
        fillers = (template, torch.where(cross, other, template))
        mixed = (torch.where(mask[:, 0], fillers[0], target), torch.where(mask[:, 1], fillers[1], target))
        features = self.encoder(torch.cat(mixed)[:, None])
        restored = self._restore(features, batch["template"], template)
        one, two = self.embed(features[-1]).chunk(2)
        errors = tuple((x - target).square().mean(dim=(1, 2, 3)) for x in restored)
        return Views(target, mask, mixed, (restored[0], restored[1]), (errors[0], errors[1]), (one, two))

    def _restore(self, features: Sequence[Tensor], modality_B: Tensor, template: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images (B, x, y, z) that the decoder makes of the features of both views."""
        offset = (modality_B if self.settings.modality_heads else torch.zeros_like(modality_B)).repeat(2)
        chosen = [offset, offset + self.heads] if self.settings.template_gain else [offset]
        outputs = self.decoder(features, torch.stack(chosen, dim=1)).float()
        images = outputs[:, 0]
        if self.settings.template_gain:
            images = images + outputs[:, 1] * template.repeat(2, 1, 1, 1)
        one, two = images.chunk(2)
        return one, two

    def embed(self, stage4: Tensor) -> Tensor:
        """Return the L2-normalised embedding (B, D) of stage-4 features that the contrast compares."""
        flat = self.projector(stage4) if self.projector is not None else stage4.flatten(1)
        return F.normalize(flat.float(), dim=1)

    @torch.no_grad()
    def validate(self, batch: Batch, clock: Clock) -> Metrics:
        """Return PSNR sums of view 2 and of its baselines, the loss terms and collapse metrics.

        PSNR (dB, data range 1) is over the masked foreground (target > 0) of a case: `psnr_model`, `psnr_copy` (the
        mixed-in modality itself) and `psnr_mean` (the training mean image, when known). Cases with one modality or
        without masked foreground in the crop are not counted.
        """
        views = self._views(batch, template_in_both=False)
        region = views.mask[:, 1] & (views.target > 0)
        valid = batch["cross"].bool() & region.any(dim=3).any(dim=2).any(dim=1)
        guesses = {"psnr_model": views.restored[1], "psnr_copy": batch["image"][:, 1]}
        if self.means is not None:
            places = zip(batch["template"].tolist(), batch["template_start"].tolist(), strict=True)
            guesses["psnr_mean"] = torch.stack([cut(self.means[m], start, self.crop) for m, start in places])
        metrics = {name: sum_and_count(psnr(x, views.target, region), valid) for name, x in guesses.items()}
        metrics["loss_distillation"] = sum_and_count(views.errors[0])
        metrics["loss_reconstruction"] = sum_and_count(views.errors[1], batch["cross"].bool())
        return {**metrics, **self._collapse(views, batch)}

    def _collapse(self, views: Views, batch: Batch) -> Metrics:
        one, two = views.embeddings
        count = torch.tensor(float(len(one)), device=one.device)
        if len(one) < 2:  # one case has no negatives: its contrast is 0 and says nothing
            return {}
        contrast = info_nce(one, two, batch["identity"], self.settings.temperature)
        values = {"loss_contrast": contrast.item(), **collapse_metrics(one, two)}
        return {name: (value * count, count) for name, value in values.items()}

    @torch.no_grad()
    def pictures(self, batch: Batch, clock: Clock) -> dict[str, NDArray[np.uint8]]:
        """Return `reconstruction` and `templates`.

        Reconstruction, a row per case (at most 4), axial middle slices: input and output of view 1, input and output
        of view 2, target. Templates, a row per modality, sagittal, coronal, axial middle slices.
        """
        views = self._views(batch, template_in_both=False)
        columns = (views.mixed[0], views.restored[0], views.mixed[1], views.restored[1], views.target)
        rows = [[middle_slice(column[i]) for column in columns] for i in range(min(4, len(views.target)))]
        templates = [[middle_slice(image, axis) for axis in (0, 1, 2)] for image in self.template.normalised()]
        titles = ("masked by template", "restored", "masked by other modality", "restored", "target")
        names = [MODALITIES[int(k)] for k in batch["template"][: len(rows)]]
        return {
            "reconstruction": montage(rows, titles=titles, names=names),
            "templates": montage(templates, titles=("sagittal", "coronal", "axial"), names=MODALITIES),
        }

    def parameter_groups(self, optimiser: OptimiserConfig) -> list[dict[str, Any]]:
        """Return the groups of the network and the template, each with its own rate.

        The template has no weight decay: min-max scaling would undo it.
        """
        parts: dict[str, list[nn.Parameter]] = {"network": [], "template": []}
        for name, parameter in self.named_parameters():
            parts["template" if name.startswith("template.") else "network"].append(parameter)
        scales = {"template": self.settings.template_lr_scale}
        return [
            {
                "name": name,
                "params": parameters,
                "lr": optimiser.lr * scales.get(name, 1.0),
                "weight_decay": 0.0 if name == "template" else optimiser.weight_decay,
            }
            for name, parameters in parts.items()
        ]


def _start_at_template(head: nn.Conv3d, heads: int) -> None:
    """Make the first output nearly the template, shrunk by `START_GAIN`, with offset 0."""
    assert head.bias is not None
    with torch.no_grad():
        head.weight.mul_(0.1)
        head.bias.copy_(START_GAIN * (torch.arange(2 * heads) >= heads))


def psnr(guess: Tensor, target: Tensor, region: Tensor) -> Tensor:
    """Return the PSNR in dB of each (B, x, y, z) image over its region, for a data range of 1; at most 100 dB."""
    count = region.sum(dim=(1, 2, 3)).clamp_min(1)
    error = ((guess - target).square() * region).sum(dim=(1, 2, 3)) / count
    return -10 * torch.log10(error.clamp_min(1e-10))


def _in_template_order(means: NDArray[np.float32], spec: PreprocessSpec) -> NDArray[np.float32]:
    expected = (len(spec.modalities), *spec.grid)
    if means.shape != expected:
        raise ValueError(f"training means must have the spec's shape {expected} (modality, x, y, z), got {means.shape}")
    out = np.zeros((len(MODALITIES), *spec.grid), dtype=np.float32)
    for image, modality in zip(means, spec.modalities, strict=True):
        if modality in MODALITIES:
            out[MODALITIES.index(modality)] = image
    return out
