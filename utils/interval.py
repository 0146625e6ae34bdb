"""Numbers that a setting may take, declared beside its default."""

from dataclasses import MISSING, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Interval:
    """Of numbers, as mathematicians write it: [0, 1) holds 0 and not 1. NaN lies in none."""

    text: str

    def __contains__(self, number: float) -> bool:
        low, high = map(float, self.text[1:-1].split(","))
        above = number > low if self.text[0] == "(" else number >= low
        return above and (number < high if self.text[-1] == ")" else number <= high)


def within(interval: str, default: Any = MISSING) -> Any:
    """A setting that is a number, or a list of them, inside `interval`; required where it has no default."""
    metadata = {"interval": Interval(interval)}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)
