"""Which samples every step takes, on any number of ranks."""

from dataclasses import dataclass

from utils.config import Config
from utils.train_config import PhaseConfig


@dataclass(frozen=True)
class StepPlan:
    """How many samples every step takes: per rank and micro-step `batch_size(step)`, ranks x accumulation of them.
    `taken_elsewhere`: samples that steps before a resume took more than they would have with this number of ranks."""

    config: Config
    world_size: int
    taken_elsewhere: int = 0

    def phase(self, step: int) -> PhaseConfig | None:
        """The curriculum's phase at a step; the last one has no end. None without a curriculum."""
        phases = self.config.train.phases
        for phase in phases[:-1]:
            if step < phase.steps:
                return phase
            step -= phase.steps
        return phases[-1] if phases else None

    def batch_size(self, step: int) -> int:
        return (self.phase(step) or self.config.train).batch_size

    def total(self, step: int) -> int:
        return self.batch_size(step) * self.world_size * self.config.train.gradient_accumulation

    def samples_before(self, step: int) -> int:
        """Samples that all ranks took in steps 0 .. step-1."""
        done, start = 0, 0
        for phase in self.config.train.phases[:-1]:
            steps = min(phase.steps, step - start)
            done, start = done + steps * self.total(start), start + steps
        return done + (step - start) * self.total(start) + self.taken_elsewhere

    def indices(self, step: int, micro: int, rank: int) -> range:
        """Global sample indices of one rank's micro-batch."""
        size = self.batch_size(step)
        first = self.samples_before(step) + (micro * self.world_size + rank) * size
        return range(first, first + size)
