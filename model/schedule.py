"""The flow-matching schedule: x_t = (1 - sigma) * x0 + sigma * noise, and the model predicts flow = noise - x0.

Timesteps are 1000 * sigma on a table of 1000 shifted entries, sigma(u) = s*u / (1 + (s-1)*u) at u_i = 1 - i/1000.
Noising and flow <-> x0 conversions snap a timestep to its nearest table entry, as Self-Forcing's code does.
"""

import torch

from model.rope import precise

NUM_TIMESTEPS = 1000
WAN_SHIFT = 5.0  # of Wan2.1 at 480p


class FlowMatchSchedule:
    """Shifted flow-matching table.

    Args:
        shift: s; 1 leaves sigma = u, larger values spend more steps near noise; None: Wan's.
    """

    def __init__(self, shift: float | None):
        shift = WAN_SHIFT if shift is None else shift
        if shift <= 0:
            raise ValueError(f"schedule shift is {shift}: must be positive")
        self.shift = shift
        u = torch.linspace(1, 0, NUM_TIMESTEPS + 1)[:-1]
        self.sigmas = shift * u / (1 + (shift - 1) * u)  # [1000], 1 down to nearly 0
        self.timesteps = self.sigmas * NUM_TIMESTEPS  # [1000]
        bell = torch.exp(-2 * ((self.timesteps - NUM_TIMESTEPS / 2) / NUM_TIMESTEPS) ** 2)
        bell = bell - bell.min()
        self.training_weights = bell * (NUM_TIMESTEPS / bell.sum())  # [1000], mean 1

    def warp(self, steps: list[float]) -> torch.Tensor:
        """Unshifted steps in (0, 1000] -> timesteps of the shifted table (shift 5: 750 -> 937.5)."""
        index = NUM_TIMESTEPS - torch.as_tensor(steps, dtype=torch.float64).round().long()
        if index.min() < 0 or index.max() >= NUM_TIMESTEPS:
            raise ValueError(f"sampling steps {list(steps)}: must lie in (0, {NUM_TIMESTEPS}]")
        return self.timesteps[index]

    def euler_sigmas(self, num_steps: int) -> torch.Tensor:
        """float32 [num_steps + 1]: sigmas of a many-step Euler sampler, from 1 to 0."""
        u = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
        return (self.shift * u / (1 + (self.shift - 1) * u)).float()

    def index(self, timestep: torch.Tensor) -> torch.Tensor:
        """Nearest table index of every timestep, same shape."""
        table = self.timesteps.to(timestep.device)
        return (table - timestep[..., None]).abs().argmin(-1)

    def sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        return self.sigmas.to(timestep.device)[self.index(timestep)]

    def training_weight(self, timestep: torch.Tensor) -> torch.Tensor:
        """Bell-shaped loss weight of a timestep, mean 1 over the table."""
        return self.training_weights.to(timestep.device)[self.index(timestep)]

    def _sigma_like(self, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """timestep [B] or [B, F] -> sigma that broadcasts over latents [B, C, F, H, W], as precise as their device."""
        sigma = self.sigma(timestep)
        sigma = sigma[:, None] if sigma.ndim == 1 else sigma
        return sigma[:, None, :, None, None].to(latents.device, precise(latents.device))  # [B, 1, F or 1, 1, 1]

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """x0, noise [B, C, F, H, W], timestep [B] or [B, F] -> x_t."""
        sigma = self._sigma_like(timestep, x0).to(x0.dtype)
        return (1 - sigma) * x0 + sigma * noise

    def flow_to_x0(self, flow: torch.Tensor, x_t: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        sigma = self._sigma_like(timestep, flow)
        return (x_t.to(sigma) - sigma * flow.to(sigma)).to(flow.dtype)

    def x0_to_flow(self, x0: torch.Tensor, x_t: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        sigma = self._sigma_like(timestep, x0)
        return ((x_t.to(sigma) - x0.to(sigma)) / sigma).to(x0.dtype)
