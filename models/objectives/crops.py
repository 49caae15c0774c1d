"""What the objectives of single-modality crops share."""

from __future__ import annotations

from collections.abc import Sequence

from models.config import TrainingConfig
from models.objectives.base import CaseInfo
from models.objectives.contrast import identity_of
from models.records import MODALITIES


def usable_modalities(case: CaseInfo, modalities: Sequence[str]) -> list[int]:
    """Return which of the store's modalities a case has and crops are made of; raises ValueError when there is none."""
    usable = [i for i, here in enumerate(case.present) if here and modalities[i] in MODALITIES]
    if not usable:
        raise ValueError(
            f"case {case.dataset}/{case.case} has no modality with a template ({', '.join(MODALITIES)}); "
            "leave it out of the selection"
        )
    return usable


def check_one_channel(config: TrainingConfig) -> None:
    """Raise ValueError for a network of several input channels."""
    if config.network.in_channels != 1:
        raise ValueError(
            f"objective {config.objective.kind!r} encodes one modality at a time: in_channels must be 1, got "
            f"{config.network.in_channels}"
        )


def of_one_person(cases: Sequence[CaseInfo]) -> list[str]:
    """Say so when all cases are of one person, who has no negatives."""
    people = {identity_of(case.dataset, case.subject, case.person) for case in cases}
    return ["all of its cases are of one person, so the contrast is always 0"] if len(people) < 2 else []
