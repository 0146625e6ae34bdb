"""The DMD gradient written out sample by sample, the slow obvious way."""

import torch
from distill import CHANNELS, FRAMES, SIZE

from pipeline.generate.inputs import Prompts
from utils.rng import keyed_generator

SEED, SHIFT, STEPS = 5, 3.0, [1000, 750, 500, 250]
INDICES = [3, 8]


def sigma_of(u):
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def snapped(timestep):
    """sigma of the table entry nearest to a timestep."""
    return min((sigma_of(1 - i / 1000) for i in range(1000)), key=lambda sigma: abs(1000 * sigma - timestep))


def drawn(role, step, index):
    """Timestep and noise [1, C, F, H, W] at which the scores of a sample are asked."""
    draw = keyed_generator(SEED, "score", role, step, index)
    u = int(torch.randint(1000, (), generator=draw)) / 1000
    noise = torch.randn((CHANNELS, FRAMES, *SIZE), generator=draw)
    return min(max(1000 * sigma_of(u), 20.0), 980.0), noise[None]


@torch.no_grad()
def flow_of(model, noisy, timestep, stage, prompt):
    return model(noisy, torch.tensor([timestep]), stage.text.encode([prompt])).sample


def generator_gradient(stage, batch, step, x0):
    """[(kl gradient [1, C, F, H, W], critic's and teacher's flow error)] of every sample."""
    result = []
    for place, (prompt, index) in enumerate(zip(batch["script"].scored, batch["indices"], strict=True)):
        own, (timestep, noise) = x0[place : place + 1].detach(), drawn("generator", step, index)
        sigma = snapped(timestep)
        noisy = (1 - sigma) * own + sigma * noise
        fake = flow_of(stage.critic, noisy, timestep, stage, prompt)
        cond = flow_of(stage.teacher, noisy, timestep, stage, prompt)
        uncond = flow_of(stage.teacher, noisy, timestep, stage, "a green square")
        fake_x0, cond_x0, uncond_x0 = (noisy - sigma * flow for flow in (fake, cond, uncond))
        scale = 3.0 if timestep >= stage.config.dmd.guidance_above else 0.0
        real_x0 = cond_x0 + scale * (cond_x0 - uncond_x0)
        gradient = (fake_x0 - real_x0) / (own - real_x0).abs().mean()
        errors = [(flow - (noise - own)).square().mean().item() for flow in (fake, cond)]
        result.append((gradient, *errors))
    return result


def generated(stage, batch, step, role="generator"):
    shots = {start: Prompts(stage.text.encode(prompts)) for start, prompts in batch["script"].prompts.items()}
    return stage._generated(role, batch, step, shots)
