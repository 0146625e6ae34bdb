"""Which samples every step takes, on any number of ranks."""

from dataclasses import dataclass

from utils.config import Config


@dataclass(frozen=True)
class StepPlan:
    """How many samples every step takes: per rank and micro-step `batch_size(step)`, ranks x accumulation of them.

    `taken_elsewhere`: samples that steps before a resume took more than they would have with this number of ranks.
    """

    config: Config
    world_size: int
    taken_elsewhere: int = 0

    def phase_of(self, step: int) -> tuple[int, int]:
        """(index of the curriculum's phase, steps before it); the last phase has no end."""
        phases, start = self.config.train.phases, 0
        for i, phase in enumerate(phases[:-1]):
            if step < start + phase.steps:
                return i, start
            start += phase.steps
        return len(phases) - 1, start

    def batch_size(self, step: int) -> int:
        train = self.config.train
        return train.phases[self.phase_of(step)[0]].batch_size if train.phases else train.batch_size

    def total(self, step: int) -> int:
        return self.batch_size(step) * self.world_size * self.config.train.gradient_accumulation

    def samples_before(self, step: int) -> int:
        """Samples that all ranks took in steps 0 .. step-1."""
        if not self.config.train.phases:
            return step * self.total(0) + self.taken_elsewhere
        current, start = self.phase_of(step)
        done = sum(p.steps * p.batch_size for p in self.config.train.phases[:current])
        done += (step - start) * self.batch_size(step)
        return done * self.world_size * self.config.train.gradient_accumulation + self.taken_elsewhere

    def indices(self, step: int, micro: int, rank: int) -> range:
        """Global sample indices of one rank's micro-batch."""
        size = self.batch_size(step)
        first = self.samples_before(step) + (micro * self.world_size + rank) * size
        return range(first, first + size)
