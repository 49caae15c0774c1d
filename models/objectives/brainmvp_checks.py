"""What a BrainMVP training can never do, said before its first step."""

from __future__ import annotations

from collections.abc import Sequence

from models.config import BrainMVPConfig, TrainingConfig
from models.masking import check_kept
from models.objectives.base import CaseInfo
from models.objectives.contrast import ranks
from models.objectives.crops import of_one_person
from models.records import MODALITIES


def check_config(config: TrainingConfig, settings: BrainMVPConfig, has_means: bool) -> None:
    """Raise ValueError for a config that cannot work, with what to change."""
    check_kept(config.data.crop, settings.mask_block, settings.mask_rate)
    if config.network.in_channels != 1:
        channels = config.network.in_channels
        raise ValueError(f"BrainMVP encodes one modality at a time: in_channels must be 1, got {channels}")
    if settings.template_init == "mean" and not has_means:
        raise ValueError("template_init 'mean' needs the training mean images; give training_means or use 'zero'")
    candidates = config.data.batch_size * (config.world_size if settings.gather_negatives else 1)
    if settings.weight_contrast and candidates < 2:
        raise ValueError(
            f"the contrast needs at least 2 cases a step (InfoNCE of one is 0), got {candidates}; "
            "raise batch_size or set weight_contrast to 0"
        )


def check_candidates(settings: BrainMVPConfig, cases: int) -> None:
    """Raise ValueError when a micro-batch of so many cases has no negative on the ranks at hand.

    A training may be continued on fewer ranks than its config names; the contrast would be 0 without a word.
    """
    candidates = cases * (ranks() if settings.gather_negatives else 1)
    if settings.weight_contrast and candidates < 2:
        raise ValueError(
            f"the contrast needs at least 2 cases a micro-batch (InfoNCE of one is 0), got {cases} on one rank; "
            "use the number of ranks of the config, or start a training with a larger batch_size"
        )


def phases_out_of_reach(settings: BrainMVPConfig, epochs: int) -> list[str]:
    """Say what a training of so many epochs never does; the phases of the presets `paper` and `code` are for 1500."""
    found = []
    if settings.weight_contrast and settings.contrast_from_epoch >= epochs:
        found.append(f"the contrast, which starts in epoch {settings.contrast_from_epoch}, never counts")
    if settings.weight_reconstruction and settings.template_view2_epochs >= epochs:
        first = settings.template_view2_epochs
        found.append(f"view 2 takes the template in the first {first}, so no other modality is ever mixed in")
    return found


def idle_terms(settings: BrainMVPConfig, modalities: Sequence[str], cases: Sequence[CaseInfo]) -> list[str]:
    """Say which loss terms are 0 in every step of a training on these cases. modalities: of the store, in order."""
    found = []
    counts = [
        sum(here and name in MODALITIES for name, here in zip(modalities, case.present, strict=True)) for case in cases
    ]
    if settings.weight_reconstruction and max(counts, default=0) < 2:
        found.append(
            f"none of its {len(cases)} cases has two modalities, so the cross-modal reconstruction is always 0; "
            "select datasets with several modalities per case"
        )
    return found + (of_one_person(cases) if settings.weight_contrast else [])
