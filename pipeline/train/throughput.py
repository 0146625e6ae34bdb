"""How much the DiTs of a stage compute, counted by formula as they are called: MFU, tokens per second, time left."""

from collections.abc import Iterable
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from model.causal_wan import CausalWanModel
from model.flops import clip_keys, device_peak, forward_flops
from pipeline.train.parallel import models_of


class FlopMeter:
    """Counts every forward of the Wan DiTs in `modules`, and a backward, twice as much, where it has a gradient."""

    def __init__(self, modules: Iterable[nn.Module], device: torch.device):
        self.peak = device_peak(device)
        self.flops = self.tokens = self.seconds = self.steps = 0
        for module in modules:
            for model in models_of(module):
                if isinstance(model, WanTransformer3DModel):
                    model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, model: WanTransformer3DModel, args: tuple, kwargs: dict[str, Any]) -> None:
        given = dict(zip(("hidden_states", "timestep", "encoder_hidden_states"), args, strict=False)) | kwargs
        latents, context = given["hidden_states"], given.get("context")
        batch, _, frames, *size = latents.shape
        frame = size[0] * size[1] // (model.config.patch_size[1] * model.config.patch_size[2])
        tokens = keys = frames * frame
        if context is not None:
            keys += context.history_tokens()
        elif isinstance(model, CausalWanModel):
            chunk = model.config.frames_per_chunk
            keys = clip_keys(frames // chunk, chunk * frame)
            tokens *= 1 if given.get("clean_hidden_states") is None else 2
        text = model.config.get("text_len") or given["encoder_hidden_states"].shape[-2]
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters())
        layers = model.config.num_layers - (not given.get("return_sample", True))  # a commit's last one does little
        flops = sum(forward_flops(model.config | {"num_layers": layers}, tokens, keys, text).values())
        self.flops += batch * (3 if trains else 1) * flops
        self.tokens += batch * tokens

    def step(self, seconds: float, ranks: int, steps_left: int) -> dict[str, float]:
        """Numbers to log of a training step that took `seconds`; counting starts anew. The time left is by the mean of
        this process's steps, as steps differ."""
        self.seconds, self.steps = self.seconds + seconds, self.steps + 1
        logs = {"tflops": self.flops / seconds / 1e12, "tokens_per_s": self.tokens * ranks / seconds}
        logs["hours_left"] = steps_left * self.seconds / self.steps / 3600
        if self.peak is not None:
            logs["mfu"] = self.flops / seconds / self.peak
        self.flops = self.tokens = 0
        return logs
