"""One video's tokens and heads over several ranks (Ulysses, arXiv 2309.14509), by diffusers' context parallelism.

    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))  # before a cache is made for the model

Of L tokens and H heads each of P ranks has L / P tokens in norms, projections, cross-attention and feed-forward, and in
self-attention, between two all-to-alls, all L tokens of H / P heads: those that its KV cache holds. Tokens of a
compressed chunk, few and seldom a multiple of P, are on every rank; of their heads too each attends its own.

Shape letters: B batch, L tokens, H heads, D head dim, P ranks, G timestep groups.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import lcm
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, FirstBlockCacheConfig, ParallelConfig
from diffusers.hooks.context_parallel import AllGatherFunction, apply_context_parallel
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention_dispatch import SeqAllToAllDim
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from utils.config import ConfigError

MESH = ("data", "ring", "ulysses")  # diffusers asks for a ring; of one rank here


class PeerError(RuntimeError):
    """Another rank of the same video has failed or stopped."""

    exit_status = 1


class Ranks(NamedTuple):
    """The P ranks that make one video, and this one's place among them."""

    group: dist.ProcessGroup
    rank: int
    size: int

    @classmethod
    def of(cls, config: ParallelConfig | None) -> "Ranks | None":
        """Those that a model's or processor's `_parallel_config` names; None: it works alone."""
        if config is None or config.context_parallel_config is None:
            return None
        mesh = config.context_parallel_config._ulysses_mesh
        return cls(mesh.get_group(), mesh.get_local_rank(), mesh.size())

    def to_heads(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """This rank's tokens [B, L / P, H, D] each -> all tokens of its heads [B, L, H / P, D] each; one message."""
        return SeqAllToAllDim.apply(self.group, torch.cat(tensors), 2, 1).chunk(len(tensors))

    def to_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """All tokens of this rank's heads [B, L, H / P, D] -> its tokens of all heads [B, L / P, H, D]."""
        return SeqAllToAllDim.apply(self.group, x, 1, 2)

    def part(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's part, one of P, of what every rank has."""
        return x.chunk(self.size, dim)[self.rank]

    def gathered(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """The parts of all ranks, put together."""
        return AllGatherFunction.apply(x.contiguous(), dim, self.group)

    def summed(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks; the same bits on each, as each adds the same numbers in the same order."""
        return self.gathered(x[None], 0).sum(0)

    def from_all(self, item: Any) -> list:
        """Every rank's `item`, by rank."""
        items = [None] * self.size
        dist.all_gather_object(items, item, self.group)
        return items

    def go_on(self, stopped: str | None = None) -> None:
        """Before each chunk; `stopped`: why this rank makes no more of them. Raises `PeerError` where another does
        not, so that none waits for it in a chunk."""
        for rank, reason in enumerate(self.from_all(stopped)):
            if stopped is None and reason is not None:
                raise PeerError(f"rank {rank} of this video stopped: {reason}")

    @contextmanager
    def together(self, given: dict[str, str] | None = None) -> Iterator[None]:
        """What is done in here before anything is sent either works on every rank or raises on each: its own error, or
        `PeerError` with another's. `given`: what must be the same on all; raises `ConfigError` where it is not."""
        try:
            yield
        except Exception as error:
            self.from_all((str(error) or type(error).__name__, None))
            raise
        found = self.from_all((None, given))
        for rank, (reason, theirs) in enumerate(found):
            if reason is not None:
                raise PeerError(f"rank {rank} of this video failed: {reason}")
            for name, value in (found[0][1] or {}).items():
                if theirs[name] != value:
                    raise ConfigError(f"the ranks of a video were given different {name}: {value} on rank 0, "
                                      f"{theirs[name]} on rank {rank}; give all the same")  # fmt: skip


def check_parts(size: int, heads: int, tokens: int | None = None) -> None:
    """Raise `ConfigError` where attention heads or the tokens that pass together do not divide by `size` ranks."""
    shared = [heads] if tokens is None else [heads, tokens]
    if any(number % size for number in shared):
        ways = [str(n) for n in range(1, heads + 1) if all(number % n == 0 for number in shared)]
        what = f"{heads} attention heads" + ("" if tokens is None else f" and {tokens} tokens a chunk")
        raise ConfigError(f"{what} cannot be shared out evenly over {size} ranks a video (parallel.sequence): use one "
                          f"of {', '.join(ways)}, or another size of video or chunk")  # fmt: skip


def sequence_mesh(device_type: str, size: int) -> DeviceMesh:
    """All ranks as [data, ring, ulysses], `size` neighbours a video. Raises `ConfigError` where some would be left."""
    world = dist.get_world_size()
    if world % size:
        raise ConfigError(f"{world} ranks do not fill groups of {size} (parallel.sequence): start a multiple of it, "
                          f"torchrun --nproc_per_node={size} ...")  # fmt: skip
    return init_device_mesh(device_type, (world // size, 1, size), mesh_dim_names=MESH)


class SequenceParallel:
    """What diffusers' `enable_parallelism` needs of a chunk-causal model, whose cache keeps heads."""

    _cp_plan = {
        "tokens": {0: ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }

    @property
    def ranks(self) -> Ranks | None:
        """That make a video together; None: this one alone."""
        return Ranks.of(self._parallel_config)

    def enable_parallelism(self, *, config, cp_plan: dict | None = None) -> None:
        """As in diffusers, once and for good; works on CPUs too, with every attention backend, and without a mesh takes
        neighbouring ranks together. Raises `ConfigError` for what does not divide or cannot be together, RuntimeError
        where it is on already or there is no process group."""
        config = ParallelConfig(context_parallel_config=config) if isinstance(config, ContextParallelConfig) else config
        context = getattr(config, "context_parallel_config", None)
        if context is None:
            super().enable_parallelism(config=config, cp_plan=cp_plan)
            return
        if self._parallel_config is not None:
            raise RuntimeError("parallelism is on already: it cannot be changed; load the model again")
        if not dist.is_initialized():
            raise ConfigError(f"{context.ulysses_degree} ranks a video: there is no process group; start them with "
                              "torchrun, and call torch.distributed.init_process_group")  # fmt: skip
        if context.ring_degree > 1:
            raise ConfigError(f"ring_degree is {context.ring_degree}: must be 1, as each rank's cache holds heads, not "
                              "tokens; use ulysses_degree")  # fmt: skip
        check_parts(context.ulysses_degree, self.config.num_attention_heads)
        processors = [block.attn1.processor for block in self.blocks]
        for processor in processors:
            if not hasattr(processor, "_parallel_config"):
                raise ConfigError(f"attention processor {type(processor).__name__} does not know sequence parallelism: "
                                  "set CausalWanAttnProcessor or a subclass of it")  # fmt: skip
        _check_step_cache(self._cache_config)
        device = self.device
        mesh = context.mesh or sequence_mesh(device.type, context.ulysses_degree)
        config.setup(dist.get_rank(), dist.get_world_size(), device, mesh=mesh)
        self._parallel_config, self.tokens = config, nn.Identity()  # what the plan splits passes through it
        for processor in processors:
            processor._parallel_config = config
        apply_context_parallel(self, context, cp_plan or self._cp_plan)

    def enable_cache(self, config) -> None:
        """As in diffusers. Raises `ConfigError` for a step cache that the ranks of a video would not agree on."""
        if self.ranks is not None:
            _check_step_cache(config)
        super().enable_cache(config)

    def _check_cache(self, cache: Any) -> None:
        """Raise RuntimeError where it holds other heads than this rank attends."""
        if cache.ranks != self.ranks:
            raise RuntimeError("the cache was made before parallelism was enabled for the model: make it afterwards")

    def _own_part(
        self, x: torch.Tensor | None, temb: torch.Tensor, modulation: torch.Tensor, text: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        """Tokens x [B, L, dim] and what G equal parts of them have, temb and modulation [B, G, ...], and a text each
        [B, G, text_len, dim] or one for all -> the same of a rank's L / P tokens. Raises `ConfigError` where L does not
        divide by P."""
        ranks = self.ranks
        if ranks is None or x is None:
            return x, temb, modulation, text

        def own(given: torch.Tensor) -> torch.Tensor:
            groups, parts = given.shape[1], lcm(given.shape[1], ranks.size)
            return given if groups == 1 else ranks.part(given.repeat_interleave(parts // groups, 1), 1)

        check_parts(ranks.size, self.config.num_attention_heads, x.shape[1])
        text = own(text) if text is not None and text.ndim == 4 else text
        return self.tokens(x), own(temb), own(modulation), text  # tokens by the hook of `_cp_plan`


def _check_step_cache(config: Any) -> None:
    if isinstance(config, FirstBlockCacheConfig):
        raise ConfigError("FirstBlockCacheConfig: each rank would decide by its own tokens which layers to leave out; "
                          "use a step cache that goes by timesteps, as PyramidAttentionBroadcastConfig")  # fmt: skip
