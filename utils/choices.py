"""What settings may be, where that is one of a few words."""

from enum import StrEnum


class CacheKind(StrEnum):
    pack = "pack"  # sink + selected mid + recent
    full = "full"  # all history, full resolution
    window = "window"  # recent only
    sink = "sink"  # sink + recent
    deep_forcing = "deep_forcing"  # sink + window, in latent frames, and tokens kept of what leaves it


class AtSwitch(StrEnum):
    """What becomes of the history where the prompt changes."""

    keep = "keep"  # it stays as it is
    recommit = "recommit"  # the recent part is committed again under the new prompt (LongLive's KV re-cache)
    restart = "restart"  # all is forgotten but the recent part, which, committed again, begins the new sink
    forget = "forget"  # all is forgotten


class SizeUnit(StrEnum):
    chunks = "chunks"
    frames = "frames"  # latent frames; must be multiples of the chunk


class QueryScope(StrEnum):
    current = "current"
    recent_and_current = "recent+current"


class CompressedKV(StrEnum):
    project = "project"  # every layer projects the same hidden tokens
    forward = "forward"  # the tokens pass through the blocks, as a small frame that attends its chunk's history


class Commit(StrEnum):
    """Where K, V of a finished chunk come from."""

    forward = "forward"  # a pass of their own over its clean latents
    last_step = "last_step"  # its last denoising step, at that step's noise: a pass less a chunk


class Refresh(StrEnum):
    per_chunk = "per_chunk"
    per_forward = "per_forward"


class MidSpan(StrEnum):
    source = "source"
    compressed = "compressed"


class OptimizerKind(StrEnum):
    adamw = "adamw"
    muon = "muon"  # the blocks' matrices by Muon, everything else by AdamW


class LossWeighting(StrEnum):
    bell = "bell"  # the schedule's training weight: most at t = 500, none at t = 1000
    none = "none"


class Precision(StrEnum):
    no = "no"
    bf16 = "bf16"


class TrackerKind(StrEnum):
    wandb = "wandb"
    tensorboard = "tensorboard"


class DataKind(StrEnum):
    sprites = "sprites"  # rendered on the fly
    latents = "latents"  # a folder of prepared shards
    prompts = "prompts"  # text alone


class Sharding(StrEnum):
    none = "none"  # every rank holds all weights
    full = "full"  # all ranks share one copy
    hybrid = "hybrid"  # groups of `shard_size` ranks share a copy each


class Reshard(StrEnum):
    forward = "forward"  # after every forward
    never = "never"  # not before the end of a rollout: one gather, and the whole student in memory meanwhile


class TextPlacement(StrEnum):
    device = "device"  # on every rank's device, in float32
    cpu = "cpu"  # in the memory of every rank's host, in the dtype it is stored in; encodes a step ahead
    sharded = "sharded"  # in shards on the devices, in the dtype it is stored in


class Offload(StrEnum):
    none = "none"  # all models on the device
    model = "model"  # one at a time, the others in host memory
    group = "group"  # weights come layer by layer
