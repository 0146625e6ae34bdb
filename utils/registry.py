"""Named choices: a feature is one class or function and one registry line, and a config names it."""

from collections.abc import Callable
from typing import Generic, TypeVar

from utils.config import ConfigError

Choice = TypeVar("Choice")


class Registry(Generic[Choice]):
    """What the values of one setting stand for.

        SAMPLERS = Registry("sampler.kind")

        @SAMPLERS.register("euler")
        def euler(...): ...

        SAMPLERS[config.sampler.kind]

    Args:
        setting: the config's key, for error messages.
    """

    def __init__(self, setting: str):
        self.setting = setting
        self._choices: dict[str, Choice] = {}

    def register(self, name: str) -> Callable[[Choice], Choice]:
        """Decorator. Raises ValueError for a name that is taken."""
        if name in self._choices:
            raise ValueError(f"{self.setting}={name} is registered already")

        def add(choice: Choice) -> Choice:
            self._choices[name] = choice
            return choice

        return add

    def __getitem__(self, name: str) -> Choice:
        """Raises `ConfigError`, which lists the known names."""
        if name not in self._choices:
            raise ConfigError(f"setting `{self.setting}` is {name}: expected one of {', '.join(self._choices)}")
        return self._choices[name]

    def __iter__(self):
        return iter(self._choices)
