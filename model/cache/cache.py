"""The three-part KV cache: full-resolution sink, compressed and selected mid, full-resolution recent.

A chunk's history is fixed while it is generated: `PackCache.context()` gives one `ChunkContext` that every denoising
step, the commit forward and the training step of that chunk read, and only `PackCache.commit()` changes the cache.

What a layer attends lies rotated in its `Workspace`, what waits to be selected un-rotated in the `Archive`.
"""

from dataclasses import replace

import torch

from model.cache.archive import Archive
from model.cache.context import ChunkContext
from model.cache.precision import keep
from model.cache.state import UNBOUNDED, CacheState
from model.cache.workspace import Buffers, PackedWorkspace, Workspace
from model.causal_wan import CausalWanModel
from model.compressor import COMPRESSORS
from model.kv import ChunkKV
from utils.choices import CacheKind
from utils.config import CacheConfig, ConfigError
from utils.registry import Registry

CACHES: Registry["type[PackCache]"] = Registry("cache.kind")


class PackCache(CacheState):
    """History of one batch of videos: `CacheState`, and what changes it."""

    @staticmethod
    def for_model(
        model: CausalWanModel, config: CacheConfig, latent_height: int, latent_width: int, trained_frames: int
    ) -> "PackCache":
        """A cache for `model` at a latent size. Raises `ConfigError` where the model lacks the compressor asked for."""
        has, wants = model.config.compressor, config.compressor.kind
        if config.kind == CacheKind.pack and config.top_k and COMPRESSORS[wants].trainable:
            stages = (has, list(model.config.compressor_channels)), (wants, list(config.compressor.channels))
            if stages[0] != stages[1]:
                raise ConfigError(f"cache.compressor is {stages[1]}: the model was built with {stages[0]}")
        geometry = model.geometry(latent_height, latent_width)
        return CACHES[config.kind](config, geometry, model.config.attention_head_dim, trained_frames, model.ranks)

    def rewind(self, most: int) -> int:
        """Forget the recent chunks, `most` of them, to commit them again in order; returns how many these are.

        Each then sees sink, mid and those committed again before it: what was recent for it has left the ring.
        """
        _, recent = self.layout.held(self.num_chunks)
        recent = recent[max(0, len(recent) - most) :]
        self.num_chunks, self.layout = recent.start, replace(self.layout, ring=recent.start)
        self._last_selection = (-1, {})
        for workspace in self.layers:
            workspace.moved()
        return len(recent)

    def context(self) -> ChunkContext:
        """The fixed history of the next chunk."""
        return ChunkContext(self)

    @torch.no_grad()
    def commit(self, kv: ChunkKV, context: ChunkContext) -> None:
        """Add the finished chunk of `context`. Raises RuntimeError where that is not the next chunk's."""
        context.check_current()
        chunk, layout, device = self.num_chunks, self.layout, kv.layers[0].key.device
        if not self.layers:
            self.layers = self._workspaces(len(kv.layers))
        slot, rotation = layout.slot(chunk), context.query_rotation(device)
        for workspace, new in zip(self.layers, kv.layers, strict=True):
            workspace.write(slot, new.key, new.value, context.times.now, rotation)
            if self.scores_recent:
                workspace.mean_queries[slot] = self.mean_query(new.query, chunk)
        if context.will_be_compressed:
            self._archive(chunk, kv)
            if kv.frame is not None:
                self.frames[chunk] = kv.frame._replace(context=context.attended())
        self._last_selection = context.selected_at, context.selection
        self.num_chunks += 1
        for chunk in [chunk for chunk in self.frames if chunk < self.archived.start]:
            del self.frames[chunk]

    def _workspaces(self, layers: int) -> list[Workspace]:
        layout, config, tokens = self.layout, self.config, self.geometry.tokens
        slots = None if layout.sink == UNBOUNDED else layout.sink + layout.recent + 1
        sizes = slots, tokens, layout.top_k * self.mid_tokens
        if not self.packs:
            return [Workspace(*sizes) for _ in range(layers)]
        shared = Buffers()
        packed = {"buffers": shared, "sink": layout.sink, "precision": config.sink_dtype}
        return [PackedWorkspace(*sizes, **packed) for _ in range(layers)]

    def _archive(self, chunk: int, kv: ChunkKV) -> None:
        mid, means = [], None
        for layer in kv.layers:
            identity = layer.mid_key is None
            mid.append((layer.key, layer.value) if identity else (layer.mid_key, layer.mid_value))
        key = mid[0][0]
        if self.selection.by_query:
            own = self.mid_rotation(0.0, key.device)
            means = self._at_true_time(self.scored_means([key for key, _ in mid], own), chunk)
        if self.archive is None:
            self.archive = Archive(self.config, self.layout.recent, len(mid), key, self.ranks)
        seen = [x for x in (kv.latents, kv.low_res) if x is not None] if self.compressor.trainable else []
        self.archive.write(chunk - self.layout.sink, mid, means, seen)

    def report(self) -> dict[str, dict[str, int]]:
        """Tokens (per layer and sample) and bytes (all layers, the whole batch) of each part for the next chunk.

        `sink`, `recent`, `mid` are what will be attended; `archive` is what waits on `archive_device`.
        """
        (sink, recent), config = self.layout.held(self.num_chunks), self.config
        parts = {
            "sink": (len(sink) * self.geometry.tokens, config.sink_dtype),
            "mid": (min(len(self.archived), self.layout.top_k) * self.mid_tokens, config.mid_dtype),
            "recent": (len(recent) * self.geometry.tokens, None),
            "archive": (len(self.archived) * self.mid_tokens, config.mid_dtype),
        }
        return {
            name: {"tokens": tokens, "bytes": tokens and tokens * self._token_bytes(precision)}
            for name, (tokens, precision) in parts.items()
        }

    def _token_bytes(self, precision: str | None) -> int:
        return 2 * len(self.layers) * keep(self.layers[0].keys[:, :1], precision).nbytes


for _kind in (CacheKind.pack, CacheKind.full, CacheKind.window, CacheKind.sink):
    CACHES.register(_kind)(PackCache)
