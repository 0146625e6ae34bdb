"""A window of latent frames with a deep sink, and tokens that outlive it (Deep Forcing, arXiv 2512.05081).

The first `sink` frames stay. Where history and current chunk would exceed `window` frames, the `recent` last ones (the
current chunk counted) stay too, and of the tokens between them `budget` - `sink` - `recent` frames' worth per layer:
those of the largest sum of q . k over recent and current queries, at the chunk's first forward. What is not chosen is
dropped at its commit. Without `budget` the oldest frames slide out instead: a window with a sink whose positions follow
it, as the V-sink of Infinite-Forcing.

Keys are kept with their rows and columns rotated and their times not; those are rotated at every forward into buffers
that all layers share, as tokens keep moving.

Shapes: B batch, T tokens held, m of them mid, n of a chunk, F frames, D head dim.
"""

from typing import NamedTuple

import torch

from model.cache.cache import CACHES, PackCache
from model.cache.context import ChunkContext
from model.cache.selection import top_chunks
from model.cache.workspace import Buffers
from model.rope import chunk_rotation, grid_positions, grid_rotation, precise, time_part, turn_in_time
from utils.choices import CacheKind, SizeUnit
from utils.config import ConfigError


class Tokens(NamedTuple):
    """What one layer holds, in time order: [sink | mid | whole frames]. Never written to: a commit makes a new one."""

    keys: torch.Tensor  # [B, T, heads, D], at time 0
    values: torch.Tensor
    times: torch.Tensor  # latent frame of each token [B, T]
    queries: torch.Tensor  # sums over a frame of the last frames' queries, at their true times [B, F, heads, D]


class DeepForcingContext(ChunkContext):
    """The history of one chunk: sink, mid tokens per layer, and the last whole frames."""

    stays = False

    def __init__(self, cache: "DeepForcingCache"):
        super().__init__(cache)
        config, frames, per_frame = cache.config, cache.geometry.frames, cache.geometry.tokens_per_frame
        self.held_sink, self.held_mid, self.held_frames = cache.held
        self.mid_tokens, self.last_frames = self.held_mid * per_frame, self.held_frames  # attended
        self.keeps_query = config.budget is not None
        if sum(cache.held) + frames > config.window:
            if config.budget is None:
                self.mid_tokens, self.last_frames = 0, config.window - self.held_sink - frames
            else:
                self.last_frames = min(self.held_frames, max(0, config.recent - frames))
                room = config.budget - self.held_sink - max(config.recent, frames)
                self.mid_tokens = per_frame * min(room, self.held_mid + self.held_frames - self.last_frames)
        self.mid_frames = self.mid_tokens // per_frame
        true = float(self.chunk * frames)
        moved = config.temporal != "absolute"
        now = float(self.held_sink + self.mid_frames + self.last_frames) if moved and config.align_mid else true
        sink = now - self.last_frames - self.mid_frames - self.held_sink if moved else 0.0
        self.times = self.times._replace(now=now, sink=sink, mid=None)
        self._tokens: dict[int, Tokens] = {}  # what each layer held

    @property
    def chooses(self) -> bool:
        candidates = self.held_mid + self.held_frames - self.last_frames
        return self.cache.config.budget is not None and candidates > self.mid_frames

    def select(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """Places of the mid tokens among those held, in time order: int64 [B, m]."""
        if layer not in self.selection:
            self.check_current()
            self.selection[layer] = self._select(layer, len(query), query)
        return self.selection[layer]

    @torch.no_grad()
    def _select(self, layer, batch, query=None):
        per_frame = self.cache.geometry.tokens_per_frame
        start = self.held_sink * per_frame
        if not self.chooses:
            return torch.arange(start, start + self.mid_tokens, device=query.device).expand(batch, -1)
        end = start + (self.held_mid + self.held_frames - self.last_frames) * per_frame
        return top_chunks(self.scores(layer, query, start, end), self.mid_tokens) + start

    def scores(self, layer: int, query: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """Sum over heads and over recent and current queries of q . k, at true times, of tokens start..end: [B, M]."""
        tokens, cache = self.cache.layers[layer], self.cache
        queries = cache.frame_queries(query, self.chunk).sum(1)  # [B, heads, D]
        if tokens.queries is not None:
            queries = queries + tokens.queries[:, tokens.queries.shape[1] - self.last_frames :].sum(1)
        keys = tokens.keys[:, start:end].to(torch.float32, copy=True)
        turn_in_time(keys, time_part(tokens.times[:, start:end], cache.head_dim))
        scores = (keys * queries[:, None]).sum((-2, -1))
        return scores if cache.ranks is None else cache.ranks.summed(scores)

    def extend(self, layer, selected, key, value, mid):
        """Keys and values of the history and the chunk itself; see `ChunkContext.extend`."""
        if self.chunk == 0:
            return key, value
        if self._is_current or layer not in self._tokens:  # else run again in a backward pass
            self.check_current()
            self._tokens[layer] = self.cache.layers[layer]
        tokens = self._tokens[layer]
        times = torch.cat(self._parts(tokens.times, selected), dim=1)
        rotation = time_part(self._positions(times), self.cache.head_dim)
        keys, values = ((*self._parts(x, selected), own) for x, own in ((tokens.keys, key), (tokens.values, value)))
        if torch.is_grad_enabled():
            placed = turn_in_time(torch.cat(keys[:-1], dim=1), rotation)
            return torch.cat((placed, key), dim=1), torch.cat(values, dim=1)
        buffers, count = self.cache.buffers, times.shape[1]
        buffers.reserve(self.cache.config.window * self.cache.geometry.tokens_per_frame, key)
        held = tuple(part[:, : count + key.shape[1]] for part in (buffers.keys, buffers.values))
        for part, new in zip(held, (keys, values), strict=True):
            torch.cat(new, dim=1, out=part)
        turn_in_time(held[0][:, :count], rotation)
        return held

    def _parts(self, x: torch.Tensor, selected: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What is attended of x, of all tokens held [B, T, ...]: of sink, mid and last frames."""
        per_frame, samples = self.cache.geometry.tokens_per_frame, torch.arange(len(selected))[:, None]
        end, last = self.held_sink * per_frame, self.last_frames * per_frame
        return x[:, :end], x[samples.to(x.device), selected], x[:, x.shape[1] - last :]

    def followed(self, tokens: Tokens, selected: torch.Tensor, new: Tokens) -> Tokens:
        """What is attended of the tokens held, and the new ones behind."""
        pairs = zip(tokens[:3], new[:3], strict=True)
        queries = None if new.queries is None else torch.cat((tokens.queries, new.queries), dim=1)
        return Tokens(*(torch.cat((*self._parts(x, selected), y), dim=1) for x, y in pairs), queries)

    def _positions(self, times: torch.Tensor) -> torch.Tensor:
        """True times of the attended tokens -> the times that they are attended at, [B, T] each."""
        config, per_frame = self.cache.config, self.cache.geometry.tokens_per_frame
        times = times.to(precise(times.device))
        counts = self.held_sink * per_frame, self.mid_tokens, self.last_frames * per_frame
        sink, mid, last = times.split(counts, dim=1)
        if config.temporal != "absolute" and config.align_mid:  # token by token, in the order of their true times
            rank = torch.arange(self.mid_tokens, device=mid.device) // per_frame
            mid = self.times.sink + self.held_sink + rank.expand(len(mid), -1)
        true = self.chunk * self.cache.geometry.frames
        return torch.cat((sink + self.times.sink, mid, last + (self.times.now - true)), dim=1)

    def attended_mid_tokens(self) -> int:
        return self.mid_tokens

    def history_tokens(self) -> int:
        return (self.held_sink + self.last_frames) * self.cache.geometry.tokens_per_frame + self.mid_tokens


@CACHES.register(CacheKind.deep_forcing)
class DeepForcingCache(PackCache):
    """History of one batch of videos, counted in latent frames. Raises `ConfigError` for settings that have no meaning
    for it."""

    def __init__(self, config, geometry, head_dim, trained_frames, ranks=None):
        def require(condition, setting, value, expected):
            if not condition:
                raise ConfigError(f"cache.kind=deep_forcing: cache.{setting} is {value}: {expected}")

        require(config.unit == SizeUnit.frames, "unit", config.unit.value, "must be frames, in which the method counts")
        require(config.temporal != "fit", "temporal", "fit", "must be packed or absolute")
        require(config.at_switch != "recommit", "at_switch", "recommit", "must be keep, restart or forget")
        for name in ("sink_dtype", "mid_dtype"):
            require(getattr(config, name) is None, name, getattr(config, name), "must be null")
        room, least = config.sink + geometry.frames, config.sink + max(config.recent, geometry.frames)
        require(room <= (config.window or 0), "window", config.window, f"must be at least {room}, sink and chunk")
        require(config.budget is None or least <= config.budget <= config.window, "budget", config.budget,
                f"must be null, or from {least}, sink and recent, to cache.window={config.window}")  # fmt: skip
        super().__init__(config, geometry, head_dim, trained_frames, ranks)

    def reset(self) -> None:
        super().reset()
        self.held = 0, 0, 0  # frames' worth of sink, mid and whole frames
        self.buffers = Buffers()

    def context(self) -> DeepForcingContext:
        return DeepForcingContext(self)

    def frame_queries(self, query: torch.Tensor, chunk: int) -> torch.Tensor:
        """query [B, n, heads, D] of a chunk -> sums over its frames' tokens, rotated at their true times, float32
        [B, B_f, heads, D]."""
        rotation = chunk_rotation(self.geometry, float(chunk * self.geometry.frames), query.shape[-1], query.device)
        return rotation(query.float()).unflatten(1, (self.geometry.frames, -1)).sum(2)

    @torch.no_grad()
    def commit(self, kv, context) -> None:
        context.check_current()
        frames, batch = self.geometry.frames, len(kv.latents)
        device, keeps = kv.latents.device, context.keeps_query
        axes = (grid_positions(size, size, False, device) for size in self.geometry.grid)
        place = grid_rotation(torch.zeros(frames), *axes, self.head_dim)
        true = torch.arange(self.geometry.tokens, device=device) // self.geometry.tokens_per_frame
        true = (self.num_chunks * frames + true).expand(batch, -1)
        layers = []
        for layer, new in enumerate(kv.layers):
            queries = self.frame_queries(new.query, self.num_chunks) if keeps else None
            fresh = Tokens(place(new.key), new.value.detach(), true, queries)
            if self.layers:
                fresh = context.followed(self.layers[layer], context.select(layer, new.query), fresh)
            if keeps:
                fresh = fresh._replace(queries=fresh.queries[:, -max(1, self.config.recent) :])
            layers.append(fresh)
        sink = min(self.config.sink, context.held_sink + context.last_frames + frames)
        moved = sink - context.held_sink  # frames that become sink while it fills
        self.held = sink, context.mid_frames, context.last_frames + frames - moved
        self.layers = layers
        self.num_chunks += 1

    def report(self):
        context, per_frame = self.context(), self.geometry.tokens_per_frame
        counts = {"sink": context.held_sink * per_frame, "mid": context.mid_tokens,
                  "recent": context.last_frames * per_frame, "archive": 0}  # fmt: skip
        return {name: {"tokens": n, "bytes": n and n * self._token_bytes(None)} for name, n in counts.items()}
