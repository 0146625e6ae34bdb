"""A slow and obvious second implementation of the network and its memory, in float64: the oracle of the tests.

Nothing is cached, batched or updated in place. A video's history is a python list of committed chunks; at every forward
its keys and values are put together again in time order, rotated from their positions by complex exponentials, and
attended with a plain softmax. Weights are read from a state dict under diffusers' names.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

THETA = 10000.0


def rotate(x, positions):
    """x [L, H, D] at positions [L, 3] (time, row, column), as complex numbers in float64."""
    dim = x.shape[-1]
    spatial = 2 * (dim // 6)
    angles = []
    for axis, width in enumerate((dim - 2 * spatial, spatial, spatial)):
        angles += [positions[:, axis] * THETA ** (-2 * i / width) for i in range(width // 2)]
    angles = torch.stack(angles, dim=1)  # [L, D/2]
    numbers = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())  # [L, H, D/2]
    turned = numbers * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.view_as_real(turned).flatten(-2)


def softmax_attention(q, k, v, visible=None):
    """q [L, H, D], k and v [M, H, D], visible [L, M] bool -> [L, H, D]."""
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[-1])
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v)


def token_positions(times, rows, cols):
    """[(time, row, column)] of every token, frame after frame, row after row."""
    return torch.tensor([(t, r, c) for t in times for r in rows for c in cols], dtype=torch.float64)


class OracleWan:
    """Wan's DiT on one video, with self-attention left to the caller."""

    def __init__(self, model):
        self.w = {name: tensor.detach().double() for name, tensor in model.state_dict().items()}
        self.config = model.config
        self.heads = model.config.num_attention_heads

    def linear(self, name, x):
        return F.linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def rms(self, name, x):
        return x / (x.square().mean(-1, keepdim=True) + self.config.eps).sqrt() * self.w[f"{name}.weight"]

    def norm(self, x, name=None):
        affine = (self.w[f"{name}.weight"], self.w[f"{name}.bias"]) if name else (None, None)
        return F.layer_norm(x, x.shape[-1:], *affine, eps=self.config.eps)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1))

    def keys_values(self, layer, hidden):
        """Un-rotated K, V [L, heads, D] of tokens [L, dim]."""
        name = f"blocks.{layer}.attn1"
        return (
            self.split(self.rms(f"{name}.norm_k", self.linear(f"{name}.to_k", hidden))),
            self.split(self.linear(f"{name}.to_v", hidden)),
        )

    def compress(self, latents):
        """Clean latents [C, F, H, W] -> hidden tokens [N_c, dim] by the strided convolutions."""
        in_time = self.config.compressor in ("hr_spatiotemporal", "dual")
        strides = [(2, 1, 1)] * in_time + [(1, 2, 2) for _ in self.config.compressor_channels]
        x = latents.double()[None]
        for stage, stride in enumerate(strides):
            name = f"pack_compressor.net.{2 * stage}"
            padding = (1, 1, 1) if in_time else (0, 1, 1)
            x = F.silu(F.conv3d(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"], stride=stride, padding=padding))
        name = f"pack_compressor.net.{2 * len(strides)}"
        x = F.conv3d(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])
        height, width = (max(1, size // 2 ** len(self.config.compressor_channels)) for size in latents.shape[-2:])
        frames = max(1, latents.shape[1] // 2) if in_time else latents.shape[1]
        x = F.adaptive_avg_pool3d(x, (frames, height, width))
        return x[0].flatten(1).T

    def time_embedding(self, t):
        half = self.config.freq_dim // 2
        angles = t * torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64) / half)
        x = torch.cat((angles.cos(), angles.sin()))
        name = "condition_embedder.time_embedder"
        temb = self.linear(f"{name}.linear_2", F.silu(self.linear(f"{name}.linear_1", x)))  # [dim]
        return temb, self.linear("condition_embedder.time_proj", F.silu(temb)).unflatten(0, (6, -1))

    def embed_text(self, text):
        padded = torch.cat((text.double(), torch.zeros(self.config.text_len - len(text), text.shape[1])))
        name = "condition_embedder.text_embedder"
        text = F.gelu(self.linear(f"{name}.linear_1", padded), approximate="tanh")
        return self.linear(f"{name}.linear_2", text)

    def patchify(self, latents):
        x = F.conv3d(latents.double()[None], self.w["patch_embedding.weight"], self.w["patch_embedding.bias"],
                     stride=self.config.patch_size)  # fmt: skip
        return x[0].flatten(1).T  # [L, dim]

    def unpatchify(self, x, frames, grid):
        (h, w), (_, ph, pw) = grid, self.config.patch_size
        return x.reshape(frames, h, w, ph, pw, -1).permute(5, 0, 1, 3, 2, 4).reshape(-1, frames, h * ph, w * pw)

    def __call__(self, latents, times, text, attend):
        """latents [C, F, H, W], one timestep per frame, text [n, text_dim] -> flow [C, F, H, W].

        attend(layer, q, k, v): un-rotated [L, heads, D] -> self-attention's output.
        """
        frames = latents.shape[1]
        grid = tuple(size // patch for size, patch in zip(latents.shape[2:], self.config.patch_size[1:], strict=True))
        per_frame = grid[0] * grid[1]
        x = self.patchify(latents)
        embedded = [self.time_embedding(float(t)) for t in times]
        temb = torch.stack([e[0] for e in embedded]).repeat_interleave(per_frame, 0)  # [L, dim]
        modulation = torch.stack([e[1] for e in embedded]).repeat_interleave(per_frame, 0)  # [L, 6, dim]
        text = self.embed_text(text)
        for layer in range(self.config.num_layers):
            x = self.block(layer, x, text, modulation, attend)
        shift, scale = (self.w["scale_shift_table"][0] + temb[:, None]).unbind(1)
        x = self.linear("proj_out", self.norm(x) * (1 + scale) + shift)
        return self.unpatchify(x, frames, grid)

    def block(self, layer, x, text, modulation, attend):
        name = f"blocks.{layer}"
        table = self.w[f"{name}.scale_shift_table"][0] + modulation  # [L, 6, dim]
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = table.unbind(1)
        y = self.norm(x) * (1 + scale) + shift
        q = self.split(self.rms(f"{name}.attn1.norm_q", self.linear(f"{name}.attn1.to_q", y)))
        k, v = self.keys_values(layer, y)
        x = x + gate * self.linear(f"{name}.attn1.to_out.0", attend(layer, q, k, v).flatten(1))
        cross = f"{name}.attn2"
        q = self.split(self.rms(f"{cross}.norm_q", self.linear(f"{cross}.to_q", self.norm(x, f"{name}.norm2"))))
        k = self.split(self.rms(f"{cross}.norm_k", self.linear(f"{cross}.to_k", text)))
        v = self.split(self.linear(f"{cross}.to_v", text))
        x = x + self.linear(f"{cross}.to_out.0", softmax_attention(q, k, v).flatten(1))
        y = self.norm(x) * (1 + ffn_scale) + ffn_shift
        y = F.gelu(self.linear(f"{name}.ffn.net.0.proj", y), approximate="tanh")
        return x + ffn_gate * self.linear(f"{name}.ffn.net.2", y)


def clip_flow(oracle, noisy, times, text, clean=None, clean_times=None):
    """Whole-clip pass over one video: chunk-causal, or teacher-forced on `clean`. Latents [C, F, H, W]."""
    frames, chunk = noisy.shape[1], oracle.config.frames_per_chunk
    h, w = (size // patch for size, patch in zip(noisy.shape[2:], oracle.config.patch_size[1:], strict=True))
    half = token_positions(range(frames), range(h), range(w))
    chunk_of = torch.arange(frames).repeat_interleave(h * w) // chunk  # [L]
    if clean is None:
        latents, positions = noisy, half
        visible = chunk_of[None, :] <= chunk_of[:, None]
    else:
        latents, times = torch.cat((clean, noisy), 1), [*clean_times, *times]
        positions = torch.cat((half, half))
        among_clean = chunk_of[None, :] <= chunk_of[:, None]
        noisy_to_clean = chunk_of[None, :] < chunk_of[:, None]
        noisy_to_noisy = chunk_of[None, :] == chunk_of[:, None]
        nothing = torch.zeros_like(among_clean)
        visible = torch.cat((torch.cat((among_clean, nothing), 1), torch.cat((noisy_to_clean, noisy_to_noisy), 1)))

    def attend(layer, q, k, v):
        return softmax_attention(rotate(q, positions), rotate(k, positions), v, visible)

    return oracle(latents, times, text, attend)[:, -frames:]


@dataclass
class Committed:
    """What is kept of a finished chunk, per layer and un-rotated: (q, k, v) full-size, (k, v) compressed."""

    full: list
    small: list


class OracleMemory:
    """The three-part cache of one video, for a `CacheConfig` with sizes in chunks."""

    def __init__(self, oracle, config, latent_size, trained_frames):
        self.oracle, self.config, self.trained_frames = oracle, config, trained_frames
        self.chunk = oracle.config.frames_per_chunk
        self.grid = tuple(s // p for s, p in zip(latent_size, oracle.config.patch_size[1:], strict=True))
        kind, halvings, self.small_frames = config.compressor.kind, len(config.compressor.channels), self.chunk
        self.small_grid = self.grid if kind == "identity" else tuple(max(1, s // 2**halvings) for s in latent_size)
        if "spatial" not in kind.split("_") and kind != "identity":  # of both time and space
            self.small_frames = max(1, self.chunk // 2)
        self.committed = []
        self.chosen, self.chosen_at = {}, None  # of the current chunk, or kept from `chosen_at`
        self.attended = {}  # layer -> ids of the last forward

    def parts(self):
        """(sink, archived, recent) ids for the next chunk."""
        ids = list(range(len(self.committed)))
        kind = self.config.kind.value
        if kind == "full":
            return ids, [], []
        sink = ids[: self.config.sink if kind != "window" else 0]
        later = ids[len(sink) :]
        cut = max(0, len(later) - self.config.recent)
        archived, recent = later[:cut], later[cut:]
        if kind != "pack":
            archived = []
        if isinstance(self.config.mid_capacity, int):
            archived = archived[-self.config.mid_capacity :]
        return sink, archived, recent

    def full_positions(self, start):
        return token_positions([start + f for f in range(self.chunk)], range(self.grid[0]), range(self.grid[1]))

    def small_positions(self, start, span):
        axes = []
        for small, full in zip(self.small_grid, self.grid, strict=True):
            aligned = self.config.spatial == "aligned"
            axes.append([(i + 0.5) * full / small - 0.5 if aligned else i for i in range(small)])
        times = [start + (f + 0.5) * span / self.small_frames - 0.5 for f in range(self.small_frames)]
        return token_positions(times, *axes)

    def layout(self, selected):
        """{id: (start, span)} of the attended history and the start of the current chunk."""
        sink, _, recent = self.parts()
        now = len(self.committed)
        if self.config.temporal == "absolute":
            return {i: (i * self.chunk, self.chunk) for i in [*sink, *selected, *recent]}, now * self.chunk
        span = self.chunk
        if self.config.temporal == "fit" and selected:
            room = self.trained_frames - self.chunk * (self.config.sink + self.config.recent + 1)
            span = min(span, room / len(selected))
        starts, cursor = {}, 0.0
        for ids, width in ((recent, self.chunk), (selected, span), (sink, self.chunk)):
            for i in reversed(ids):
                cursor -= width
                starts[i] = (cursor, width)
        return starts, 0.0

    def sampled(self, q):
        total = len(q)
        target = min(total, max(self.config.min_queries, int(self.config.query_fraction * total)))
        return [n * total // target for n in range(target)]

    def scores(self, layer, q):
        """{id: mean over queries, keys and the first half of the heads of q.k / sqrt(D)}, every pair by itself."""
        _, archived, recent = self.parts()
        heads = max(1, q.shape[1] // 2)
        index = self.sampled(q)
        asked = [(q, len(self.committed))]
        if self.config.query_scope.value == "recent+current":
            asked += [(self.committed[i].full[layer][0], i) for i in recent]
        queries = [rotate(x, self.full_positions(i * self.chunk))[index, :heads] for x, i in asked]
        queries = torch.cat(queries)
        result = {}
        for i in archived:
            keys = rotate(self.committed[i].small[layer][0], self.small_positions(i * self.chunk, self.chunk))
            result[i] = float((torch.einsum("ihd,jhd->hij", queries, keys[:, :heads]) / math.sqrt(q.shape[-1])).mean())
        return result

    def choose(self, layer, q):
        _, archived, _ = self.parts()
        if len(archived) <= self.config.top_k:
            return archived
        if self.config.selection == "recency":
            return archived[len(archived) - self.config.top_k :]
        scores = self.scores(layer, q)
        return sorted(sorted(archived, key=lambda i: -scores[i])[: self.config.top_k])

    def attend(self, layer, q, k, v):
        """Self-attention of the current chunk over sink, selected mid, recent and itself, in time order."""
        if self.config.refresh.value == "per_forward":
            selected = self.choose(layer, q)
        else:
            if layer not in self.chosen:
                self.chosen[layer] = self.choose(layer, q)
            selected = self.chosen[layer]
        self.attended[layer] = selected
        return self.over_history(layer, selected, q, k, v, self.full_positions)

    def over_history(self, layer, selected, q, k, v, own_positions):
        sink, _, recent = self.parts()
        starts, now = self.layout(selected)
        keys, values = [], []
        for i in [*sink, *selected, *recent]:
            start, span = starts[i]
            if i in selected:
                key, value = self.committed[i].small[layer]
                keys.append(rotate(key, self.small_positions(start, span)))
            else:
                _, key, value = self.committed[i].full[layer]
                keys.append(rotate(key, self.full_positions(start)))
            values.append(value)
        own = own_positions(now)
        keys, values = torch.cat([*keys, rotate(k, own)]), torch.cat([*values, v])
        return softmax_attention(rotate(q, own), keys, values)

    def flow(self, latents, timestep, text):
        """Flow [C, B_f, H, W] of the current chunk at one timestep."""
        return self.oracle(latents, [timestep] * self.chunk, text, self.attend)

    def commit(self, clean, timestep, text, noisy=None):
        """One forward on `clean` (or on its renoised form `noisy`); its K, V become history."""
        full = []

        def attend(layer, q, k, v):
            full.append((q, k, v))
            return self.attend(layer, q, k, v)

        self.oracle(clean if noisy is None else noisy, [timestep] * self.chunk, text, attend)
        if self.config.compressor.kind == "identity":
            small = [(k, v) for _, k, v in full]
        elif self.config.compressor.kv == "project":
            hidden = self.oracle.compress(clean)
            small = [self.oracle.keys_values(layer, hidden) for layer in range(len(full))]
        else:
            small = self.passed(self.oracle.compress(clean), timestep, text)
        self._finish()
        self.committed.append(Committed(full, small))
        self._renew()

    def passed(self, hidden, timestep, text):
        """K, V of every layer as the hidden tokens pass, in the chunk's place and with its history but for itself."""
        small, text = [], self.oracle.embed_text(text)
        _, modulation = self.oracle.time_embedding(timestep)
        modulation = modulation.expand(len(hidden), -1, -1)

        def attend(layer, q, k, v):
            small.append((k, v))
            own = lambda now: self.small_positions(now, self.chunk)  # noqa: E731
            return self.over_history(layer, self.attended[layer], q, k, v, own)

        for layer in range(self.oracle.config.num_layers):
            hidden = self.oracle.block(layer, hidden, text, modulation, attend)
        return small

    def _finish(self):
        if self.chosen_at is None:
            self.chosen_at = len(self.committed)

    def _renew(self):
        """Keep a query-scored choice for `refresh_interval` chunks, while everything it names is still archived."""
        _, archived, _ = self.parts()
        complete = all(len(ids) == self.config.top_k and set(ids) <= set(archived) for ids in self.chosen.values())
        lasting = len(self.committed) < self.chosen_at + self.config.refresh_interval
        if not (complete and lasting and self.config.selection == "query_score"):
            self.chosen, self.chosen_at = {}, None


class OracleDeepForcing(OracleMemory):
    """Deep Forcing for one video: every layer holds a list of (time, row, column, key, value), un-rotated."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.held = {}  # layer -> (sink, mid, whole frames' tokens)
        self.queries = {}  # layer -> [(time, row, column, query)] of every token so far

    def now(self):
        return len(self.committed) * self.chunk

    def choose(self, layer, q):
        """(sink, mid, last) tokens that the current chunk attends."""
        config, per_frame = self.config, self.grid[0] * self.grid[1]
        sink, mid, later = self.held.get(layer, ([], [], []))
        frames = len(later) // per_frame
        if len(sink + mid + later) // per_frame + self.chunk <= config.window:
            return sink, mid, later
        if config.budget is None:
            keep = config.window - config.sink - self.chunk
            return sink, [], later[(frames - keep) * per_frame :]
        last = min(frames, max(0, config.recent - self.chunk))
        candidates, later = mid + later[: (frames - last) * per_frame], later[(frames - last) * per_frame :]
        own = [(*place, query) for place, query in zip(self.places(self.now()), q, strict=True)]
        recent = [entry for entry in self.queries.get(layer, []) if entry[0] >= self.now() - last] + own
        asked = sum(rotate(query[None], torch.tensor([(t, r, c)], dtype=torch.float64))[0] for t, r, c, query in recent)
        scores = [
            float((rotate(key[None], torch.tensor([(t, r, c)], dtype=torch.float64))[0] * asked).sum())
            for t, r, c, key, _ in candidates
        ]
        room = (config.budget - config.sink - max(config.recent, self.chunk)) * per_frame
        best = sorted(sorted(range(len(candidates)), key=lambda i: -scores[i])[:room])
        return sink, [candidates[i] for i in best], later

    def places(self, start):
        return [tuple(place) for place in self.full_positions(start).tolist()]

    def attend(self, layer, q, k, v):
        if layer not in self.chosen:
            self.chosen[layer] = self.choose(layer, q)
        sink, mid, last = self.chosen[layer]
        per_frame, config = self.grid[0] * self.grid[1], self.config
        true, mid_frames, last_frames = self.now(), len(mid) // per_frame, len(last) // per_frame
        start = true - last_frames - mid_frames - len(sink) // per_frame
        positions, moved = [], config.temporal != "absolute"
        positions += [(t + start if moved else t, r, c) for t, r, c, *_ in sink]
        for rank, (t, r, c, *_) in enumerate(mid):
            aligned = true - last_frames - mid_frames + rank // per_frame
            positions.append((aligned if moved and config.align_mid else t, r, c))
        positions += [(t, r, c) for t, r, c, *_ in last]
        tokens, own = [*sink, *mid, *last], self.full_positions(true)
        self.attended[layer] = [(t, r, c) for t, r, c, *_ in tokens]
        keys, values = rotate(k, own), v
        if tokens:
            placed = rotate(torch.stack([key for *_, key, _ in tokens]), torch.tensor(positions, dtype=torch.float64))
            keys, values = torch.cat((placed, keys)), torch.cat((torch.stack([value for *_, value in tokens]), values))
        return softmax_attention(rotate(q, own), keys, values)

    def commit(self, clean, timestep, text, noisy=None):
        full, per_frame = [], self.grid[0] * self.grid[1]

        def attend(layer, q, k, v):
            full.append((q, k, v))
            return self.attend(layer, q, k, v)

        self.oracle(clean, [timestep] * self.chunk, text, attend)
        for layer, (queries, keys, values) in enumerate(full):
            places = self.places(self.now())
            sink, mid, last = self.chosen[layer]
            later = last + [(*place, key, value) for place, key, value in zip(places, keys, values, strict=True)]
            more = self.config.sink * per_frame - len(sink)
            self.held[layer] = sink + later[:more], mid, later[more:]
            new = [(*place, query) for place, query in zip(places, queries, strict=True)]
            self.queries[layer] = self.queries.get(layer, []) + new
        self.committed.append(None)
        self.chosen = {}
