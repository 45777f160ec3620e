"""What the training loop needs, once everything is loaded."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from utils.adapters.beside import Chosen
from utils.data.plan import Plan
from utils.encoding.conditioning import Batch
from utils.encoding.samples import Samples
from utils.training.checkpoint_plan import CheckpointPlan
from utils.training.experts import Experts
from utils.training.learner import Learner
from utils.training.phases import Phase, Schedule
from utils.training.preview import Preview
from utils.training.validation import Losses
from utils.training.variety import Variety


@dataclass(frozen=True)
class Session:
    """Who learns, in which phases, from which samples, and what is measured in between."""

    learner: Learner
    schedule: Schedule  # which update a step has; ordinary training has always the same
    experts: Experts  # the transformers; most models have one
    samples: Samples
    plan: Plan
    steps_per_epoch: int
    validation: list[Batch]
    preview: Preview | None
    further: Mapping[str, Sequence[Chosen]]  # LoRAs that act beside those in training in previews
    kept: CheckpointPlan  # what blocks keep for the backward pass
    needed: str  # the flags that the test script needs to show this model
    variety: Mapping[str, Variety] = field(default_factory=dict)  # of students, by the names of their phases

    @property
    def is_watched(self) -> bool:
        """Whether there is something to validate."""
        return bool(self.validation or self.variety)

    def validate(self, device: torch.device, seed: int) -> dict[str, Losses]:
        """The losses of each phase on the validation clips; none without clips."""
        phases = self.schedule.phases if self.validation else []
        return {phase.name: self.validate_phase(phase, self._watched(device), seed) for phase in phases}

    def measure_variety(self) -> dict[str, float]:
        """How much each student's samples differ, as a share of its teacher's, with what it would export."""
        shares = {}
        for phase in self.schedule.phases:
            if phase.name in self.variety:
                with self.learner.as_exported(), phase.speaking():
                    shares[phase.name] = self.variety[phase.name].share_of_student()
        return shares

    def validate_phase(self, phase: Phase, clips: Iterable[Batch], seed: int) -> Losses:
        """The losses of a phase on clips on the device, with what it would export."""
        with self.learner.as_exported():
            return phase.validate(clips, seed)

    def _watched(self, device: torch.device) -> Iterator[Batch]:
        """The validation clips, one after another on the device."""
        return (batch.to(device) for batch in tqdm(self.validation, desc="validating", leave=False))

    def show(self, preview: Preview) -> list[tuple[str, Tensor]]:
        """The videos of previews."""
        with self.learner.as_exported(), self.experts.beside(self.further):
            return preview.generate(self.experts.predict)
