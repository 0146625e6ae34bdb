"""What can be found wrong with a training run before any of its models is allocated."""

from utils.config import Config, ConfigError
from utils.config import Stage as StageName


def check_plan(config: Config, world_size: int) -> None:
    """Raise `ConfigError` where sizes do not go together; needs no model and no data."""
    train = config.train
    if train.stage is None:
        raise ConfigError(f"setting `train.stage` is not set: choose one of {', '.join(StageName)}")
    if train.total_batch_size is None:
        return
    if train.phases:
        raise ConfigError("settings `train.total_batch_size` and `train.phases` exclude each other: unset one")
    product = world_size * train.batch_size * train.gradient_accumulation
    if product != train.total_batch_size:
        raise ConfigError(
            f"setting `train.total_batch_size` is {train.total_batch_size}, but {world_size} ranks x batch_size "
            f"{train.batch_size} x gradient_accumulation {train.gradient_accumulation} = {product}: change one of them"
        )
