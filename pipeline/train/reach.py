"""Whether rollouts in training reach the compressed part of the cache: where none does, it would not be trained."""

from model.cache.state import CacheLayout
from model.geometry import ChunkGeometry
from utils.choices import CacheKind
from utils.config import CacheConfig, ConfigError


def attends_mid(cache: CacheConfig, chunks: int, geometry: ChunkGeometry) -> bool:
    """Whether the last of `chunks` chunks has an archived one behind it to attend."""
    sink, recent = CacheLayout.of(cache, geometry).held(chunks - 1)
    return cache.kind == CacheKind.pack and cache.top_k > 0 and recent.start > len(sink)


def inert(cache: CacheConfig, chunks: int) -> ConfigError:
    """What is wrong where no rollout, the longest of `chunks`, attends a compressed chunk."""
    return ConfigError(
        f"cache.top_k is {cache.top_k}, but no chunk of a rollout of {chunks} chunks attends a compressed one "
        f"(sink {cache.sink}, recent {cache.recent} {cache.unit.value}): the compressor would not be trained; "
        "make cache.sink or cache.recent smaller or dmd.max_rollout_frames larger, or set cache.top_k=0"
    )


def check_mid_is_reached(cache: CacheConfig, chunks: int, shape: tuple[int, int, int]) -> None:
    """Raise `ConfigError` where the cache has a compressed part that no rollout would ever fill. `shape`: of a chunk,
    latent frames, height and width."""
    reached = attends_mid(cache, chunks, ChunkGeometry(*shape))
    if not reached and cache.kind == CacheKind.pack and cache.top_k > 0:
        raise inert(cache, chunks)
