"""Losses of distribution-matching distillation and of flow matching, as pure functions of tensors."""

import torch
import torch.nn.functional as F


def guided(cond: torch.Tensor, uncond: torch.Tensor, guidance: float | torch.Tensor) -> torch.Tensor:
    """Classifier-free guidance of the DMD real score: cond + g * (cond - uncond)."""
    return cond + guidance * (cond - uncond)


def kl_gradient(x0: torch.Tensor, fake_x0: torch.Tensor, real_x0: torch.Tensor) -> torch.Tensor:
    """Normalised gradient of the reverse KL with respect to x0 (DMD, arXiv 2311.18828, eq. 7 and 8). (fake_x0 -
    real_x0) / mean|x0 - real_x0|, the mean per sample; nan becomes 0. All [B, C, F, H, W]."""
    scale = (x0 - real_x0).abs().mean(dim=tuple(range(1, x0.ndim)), keepdim=True)
    return torch.nan_to_num((fake_x0 - real_x0) / scale)


def dmd_loss(x0: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """0.5 * mse(x0, stopgrad(x0 - gradient)) in float64: its gradient is `gradient` over the number of elements."""
    target = (x0.double() - gradient.double()).detach()
    return 0.5 * F.mse_loss(x0.double(), target)


def flow_loss(flow: torch.Tensor, noise: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
    """Mean squared error of a predicted flow against noise - x0, per sample: [B, C, F, H, W] -> [B]."""
    return (flow - (noise - x0)).square().flatten(1).mean(1)
