"""Named choices: a feature is one class or function and one registry line, and a config names it."""

from collections.abc import Callable
from typing import TypeVar

from utils.config import ConfigError

Choice = TypeVar("Choice")


class Registry(dict[str, Choice]):
    """What the values of one setting stand for, in the order in which they were registered.

        SAMPLERS = Registry("sampler.kind")  # the config's key, for error messages

        @SAMPLERS.register("euler")
        def euler(...): ...

        SAMPLERS[config.sampler.kind]  # ConfigError, which lists the known names, for an unknown one
    """

    def __init__(self, setting: str):
        super().__init__()
        self.setting = setting

    def register(self, name: str) -> Callable[[Choice], Choice]:
        """Decorator. Raises ValueError for a name that is taken."""
        if name in self:
            raise ValueError(f"{self.setting}={name} is registered already")

        def add(choice: Choice) -> Choice:
            self[name] = choice
            return choice

        return add

    def __missing__(self, name: str) -> Choice:
        raise ConfigError(f"setting `{self.setting}` is {name}: expected one of {', '.join(self)}")
