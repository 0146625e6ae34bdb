"""Why the loss of consistency distillation rises: in one dimension, with an exact teacher, its target is what moves.

    python -m pytest -m slow -s tests/test_consistency_curve.py     # the numbers in docs/concepts.md
"""

import copy

import pytest
import torch
from torch import nn

from model.schedule import FlowMatchSchedule

LEVELS, MODES, STD, EMA = 16, torch.tensor([-1.0, 1.0]), 0.1, 0.98
SIGMAS = FlowMatchSchedule(5.0).euler_sigmas(LEVELS)


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.flow = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, x, sigma):
        return x - sigma * self.flow(torch.stack((x, sigma), 1))[:, 0]


def posterior_mean(x, sigma):
    """E[x0 | x] of x = (1 - sigma) x0 + sigma noise: what a diffusion model answers."""
    scale, variance = 1 - sigma, ((1 - sigma) * STD) ** 2 + sigma**2
    off = x[:, None] - scale[:, None] * MODES
    share = (-off.square() / (2 * variance[:, None])).softmax(1)
    return (share * (MODES + (scale * STD**2 / variance)[:, None] * off)).sum(1)


def draw(count):
    x0 = MODES[torch.randint(2, (count,))] + STD * torch.randn(count)
    return x0, torch.randn(count), torch.arange(count) % LEVELS


def loss(student, target, x0, noise, level):
    """The loss, and the student's answers, as `ConsistencyStage.loss` has them."""
    sigma, following = SIGMAS[level], SIGMAS[level + 1]
    noisy = (1 - sigma) * x0 + sigma * noise
    flow = (noisy - posterior_mean(noisy, sigma)) / sigma
    with torch.no_grad():
        wanted = target(noisy + (following - sigma) * flow, following)
    answers = student(noisy, sigma)
    return (answers - wanted).square().mean(), answers


def curve(start, moves, checkpoints):
    student, target, held_out, found = copy.deepcopy(start), copy.deepcopy(start), draw(8192), {}
    optimizer = torch.optim.Adam(student.parameters(), 5e-4)
    for step in range(max(checkpoints) + 1):
        if step in checkpoints:
            error, answers = loss(student, target, *held_out)
            between = (answers.abs() < 0.5).float().mean()
            found[step] = [x.item() for x in (error, (answers - held_out[0]).square().mean(), between)]
        optimizer.zero_grad()
        loss(student, target, *draw(256))[0].backward()
        optimizer.step()
        if moves:
            for slow, fast in zip(target.parameters(), student.parameters(), strict=True):
                slow.data.lerp_(fast.data, 1 - EMA)
    return found


@pytest.mark.slow
def test_the_loss_rises_while_the_target_moves_and_falls_when_it_has_arrived():
    torch.manual_seed(0)
    start = Student()
    optimizer = torch.optim.Adam(start.parameters(), 2e-3)
    for _ in range(4000):  # to the diffusion model's answers
        x0, noise, level = draw(256)
        sigma = SIGMAS[level]
        x = (1 - sigma) * x0 + sigma * noise
        optimizer.zero_grad()
        ((start(x, sigma) - posterior_mean(x, sigma)) / sigma.clamp(min=0.05)).square().mean().backward()
        optimizer.step()
    steps = (25, 100, 450, 1000, 6000)
    moving, frozen = (curve(start, moves, steps) for moves in (True, False))
    for step in steps:
        print(step, "moving", moving[step], "frozen", frozen[step])
    assert moving[450][0] > 1.2 * moving[100][0] > 2 * moving[6000][0]  # a hill
    assert moving[6000][1] > 1.4 * moving[25][1] and moving[6000][2] < 0.15  # samples, no means
    assert frozen[450][0] < 0.7 * frozen[100][0] and frozen[6000][2] > 0.6  # lower, and nothing learnt
