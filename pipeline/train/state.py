"""Optimizer, learning rate, gradient clip and EMA of one role of a training stage."""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from pipeline.train.method import Stage
from pipeline.train.parallel import global_norm, local
from utils.choices import OptimizerKind
from utils.train_config import OptimizerConfig, TrainConfig


def learning_rate(config: OptimizerConfig, step: int, max_steps: int) -> float:
    """Linear warm-up, then `lr`, then a linear fall to zero over the last `decay_steps`."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    decay = min(1.0, (max_steps - step) / config.decay_steps) if config.decay_steps else 1.0
    return config.lr * min(warmup, max(decay, 0.0))


def build_optimizers(module: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the matrices inside the transformer blocks and AdamW for the rest. Vectors (norms, biases, the
    rows of modulation tables) get no weight decay. Sharded and whole parameters are in groups of their own, as fused
    updates take no mixture."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    by_muon = [p for name, p in named if config.kind == OptimizerKind.muon and "blocks." in name and p.ndim == 2]
    chosen = {id(p) for p in by_muon}
    rest = [(p, p.ndim >= 2 and "scale_shift_table" not in name) for name, p in named if id(p) not in chosen]
    groups = [
        {
            "params": [p for p, decayed in rest if decayed == decays and isinstance(p, DTensor) == sharded],
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for decays in (True, False)
        for sharded in (True, False)
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=tuple(config.betas), fused=True)
    ]
    if by_muon:
        # match_rms_adamw scales updates so that one learning rate serves both.
        optimizers.append(
            torch.optim.Muon(by_muon, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
        )
    return optimizers


CLIP_EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_


class RoleState:
    """Everything that changes when a role of a stage is updated, apart from its gradients. An EMA is kept from step
    `ema_start` on (None: none is), or from the start in the role's target, where the stage runs one."""

    def __init__(self, stage: Stage, role: str, train: TrainConfig):
        self.module, self.parts = stage.modules[role], stage.parts(role)
        self.config, self.max_steps = stage.optimizer(role) or train.optimizer, train.max_steps
        self.ema_decay, self.ema_start = train.ema_decay, train.ema_start_step if stage.keeps_ema(role) else None
        self.optimizers = build_optimizers(self.module, self.config)
        self.ema: dict[str, torch.Tensor] | None = None
        if role in stage.targets:
            held = dict(stage.targets[role].named_parameters())
            self.ema = {name: held[name].detach() for name, p in self.module.named_parameters() if p.requires_grad}

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.module.parameters() if p.requires_grad]

    def gradients(self) -> list[torch.Tensor]:
        """Gradients of all parameters; one that got none counts as zero, so that ranks agree on the list."""
        for p in self.parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return [p.grad for p in self.parameters]

    def gradient_norms(self) -> dict[str, float]:
        """Norm of the gradient of every part, to log."""
        return {
            f"grad_norm_{name}": global_norm(p.grad for p in part.parameters() if p.grad is not None).item()
            for name, part in self.parts.items()
        }

    def clip(self, max_norm: float) -> float:
        """Scale the gradients to a norm of at most `max_norm` over all parameters and ranks; returns what it was."""
        gradients = self.gradients()
        norm = global_norm(gradients)
        scale = (max_norm / (norm + CLIP_EPSILON)).clamp(max=1.0)
        torch._foreach_mul_([local(gradient) for gradient in gradients], scale)
        return norm.item()

    def update(self, step: int) -> dict[str, float]:
        """One optimizer step, then the EMA; returns the learning rate and how far every part moved, to log."""
        rate = learning_rate(self.config, step, self.max_steps)
        before = {name: [p.detach().clone() for p in part.parameters()] for name, part in self.parts.items()}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        self._update_ema(step)
        moved = {
            f"update_norm_{name}": global_norm(
                p.detach() - old for p, old in zip(self.parts[name].parameters(), olds, strict=True)
            ).item()
            for name, olds in before.items()
        }
        return {"lr": rate} | moved

    @torch.no_grad()
    def _update_ema(self, step: int) -> None:
        if self.ema is None and (self.ema_start is None or step < self.ema_start):
            return
        named = {name: p.detach() for name, p in self.module.named_parameters() if p.requires_grad}
        if self.ema is None:
            self.ema = {name: p.clone() for name, p in named.items()}
        else:
            held, new = ([local(values[name]) for name in named] for values in (self.ema, named))
            torch._foreach_lerp_(held, new, 1 - self.ema_decay)

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None

    def tensors(self) -> dict[str, Any]:
        """Everything that a checkpoint must hold, as nested dicts of tensors by parameter name. They are the live ones:
        loading into them restores the state."""
        names = {p: name for name, p in self.module.named_parameters()}
        state = {"module": self.module.state_dict(), "optimizer": {}}
        for optimizer in self.optimizers:
            for p, values in optimizer.state.items():
                state["optimizer"][names[p]] = values
        if self.ema is not None:
            state["ema"] = self.ema
        return state

    def allocated(self) -> dict[str, bool]:
        """Which parts of the state exist yet; what `allocate` takes."""
        return {"optimizer": any(optimizer.state for optimizer in self.optimizers), "ema": self.ema is not None}

    def allocate(self, optimizer: bool, ema: bool) -> None:
        """Create state that appears in training only, for `tensors` to show it; values are not meaningful."""
        if optimizer:
            self.zero_grad()
            self.gradients()
            for each in self.optimizers:
                for group in each.param_groups:
                    group["lr"] = 0.0  # until the next update
                each.step()
            self.zero_grad()
        if ema and self.ema is None:
            self.ema = {name: p.detach().clone() for name, p in self.module.named_parameters() if p.requires_grad}
