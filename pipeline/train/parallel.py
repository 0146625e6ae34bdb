"""FSDP2 from outside the models: weights, gradients, optimizer state and EMA of a stage live as shards (DTensors).

A Wan transformer is sharded block by block, a text encoder likewise; what is outside the blocks (the compressor too)
is one more group. What Wan needs in float32 (diffusers' `_keep_in_fp32_modules`: time embedding, norms, modulation
tables) stays whole on every rank: it is small, and an FSDP group is cast to one dtype. The trainer averages those
gradients as it does without sharding. Works on CUDA with NCCL and on the CPU with gloo.
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers import PreTrainedModel, UMT5EncoderModel

from model.causal_wan import CausalWanModel
from model.weights import cast_weights
from pipeline.train.method import Stage
from utils.choices import Sharding
from utils.config import Config
from utils.distributed import World

# Outputs of Wan blocks are views; nothing changes them in place.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def named_models(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The Wan transformers and text encoders in `module`, itself included, with their names in it: what is sharded as a
    unit and saved as a model."""
    if isinstance(module, WanTransformer3DModel | PreTrainedModel):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from named_models(child, f"{name}.{child_name}".lstrip("."))


def models_of(module: nn.Module) -> list[nn.Module]:
    return [model for _, model in named_models(module)]


def shard_size(config: Config, world: World) -> int:
    """Ranks that share one copy of the weights; 1: every rank has its own."""
    if world.size == 1 or config.train.sharding == Sharding.none:
        return 1
    if config.train.sharding == Sharding.full:
        return world.size
    return config.train.shard_size or world.local_size


def sharding_mesh(config: Config, world: World, device: torch.device) -> DeviceMesh | None:
    """Ranks as [shards], or [copies, shards] for hybrid sharding; None where nothing is sharded."""
    size = shard_size(config, world)
    if size == 1:
        return None
    if config.train.sharding == Sharding.full:
        return init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (world.size // size, size), mesh_dim_names=("replicate", "shard"))


def prepare_stage(stage: Stage, config: Config, world: World, device: torch.device) -> bool:
    """Move the stage's modules, targets and frozen modules to `device`, in shards where `train.sharding` says so;
    returns whether it does. A model that was built on the CPU then never is on the device as a whole.

    In mixed precision the time embedding is also kept out of autocast, sharded or not.
    """
    mesh = sharding_mesh(config, world, device)
    for module in (*stage.modules.values(), *stage.targets.values(), *stage.frozen_modules()):
        for model in models_of(module):
            if config.train.mixed_precision == "bf16" and isinstance(model, WanTransformer3DModel):
                _keep_out_of_autocast(model.condition_embedder.time_embedder, device.type)
            if module in stage.offloaded:
                continue
            if mesh is not None and not isinstance(model, FSDPModule):
                shard_model(model, mesh, config.train.mixed_precision, device)
            _place(model, model, device)
        if module not in stage.offloaded:
            module.to(device)
    return mesh is not None


def keeps_attention(config: Config, device: torch.device) -> bool:
    """Whether checkpointing keeps what attention gave: not on a CPU, where matrix products stand for it."""
    return config.train.gradient_checkpointing and config.train.keep_attention and device.type == "cuda"


def _place(part: nn.Module, model: nn.Module, device: torch.device) -> None:
    """Move a part of a model that was loaded as it is stored, in the dtype that `prepare` noted."""
    dtype = getattr(model, "placed_dtype", None)
    if dtype is not None:
        cast_weights(part, dtype, model._keep_in_fp32_modules, device)


def shard_model(model: nn.Module, mesh: DeviceMesh, mixed_precision: str, device: torch.device) -> None:
    """Shard a Wan transformer or a text encoder in place, one group after the other on `device`.

    Inputs are not cast: the trainer's autocast does that per operation, and timesteps need float32. Every group is
    resharded after its forward, the root too, so that outside a forward parameters always are shards.
    """
    wan = isinstance(model, WanTransformer3DModel)
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if wan and mixed_precision == "bf16":
        policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    options = {
        "mesh": mesh,
        "mp_policy": policy,
        "reshard_after_forward": True,
        "ignored_params": set(_float32_parameters(model)) if wan else set(),
    }
    for block in model.modules():
        if type(block).__name__ in model._no_split_modules:
            _place(block, model, device)
            fully_shard(block, **options)
    _place(model, model, device)
    fully_shard(model, **options)


def _float32_parameters(model: WanTransformer3DModel) -> Iterator[nn.Parameter]:
    kept = set(model._keep_in_fp32_modules)
    return (p for name, p in model.named_parameters() if not kept.isdisjoint(name.split(".")))


def _keep_out_of_autocast(module: nn.Module, device_type: str) -> None:
    """Autocast would round the sinusoids of a timestep to bfloat16; Wan runs the time embedding in float32."""
    entered = []

    def enter(module, inputs):
        entered.append(torch.autocast(device_type, enabled=False))
        entered[-1].__enter__()

    def leave(module, inputs, output):
        entered.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave, always_call=True)


def set_gradient_sync(module: nn.Module, sync: bool) -> None:
    """Whether the next backward reduces gradients over ranks: only the last micro-step of an accumulation must."""
    for model in models_of(module):
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(sync)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, the weights of a sharded model stay whole from one forward to the next."""
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in shards:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor; a collective call where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def global_norm(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """2-norm over all tensors, shards and whole ones; a collective call where there are shards."""
    tensors = list(tensors)
    kinds = ([x for x in tensors if isinstance(x, DTensor)], [x for x in tensors if not isinstance(x, DTensor)])
    return get_total_norm([whole(get_total_norm(kind)) for kind in kinds if kind])


def plain_class(model: nn.Module) -> type[nn.Module]:
    """The model's own class; FSDP puts one of its making in front."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


def model_config(model: nn.Module) -> dict[str, Any]:
    """What `model_from_config` needs, as plain values."""
    config = model.config.to_dict() if isinstance(model, PreTrainedModel) else model.config
    public = {key: value for key, value in config.items() if not key.startswith("_")}  # the rest says where it is from
    return public | {"_class_name": plain_class(model).__name__}


def model_from_config(config: dict[str, Any]) -> nn.Module:
    """The model that `model_config` describes, its parameters on the meta device."""
    kinds = {kind.__name__: kind for kind in (CausalWanModel, WanTransformer3DModel, UMT5EncoderModel)}
    kind = kinds[config["_class_name"]]
    with init_empty_weights(include_buffers=False):
        if issubclass(kind, PreTrainedModel):
            return kind(kind.config_class.from_dict(config))
        return kind.from_config(config)


def plain_copy(model: nn.Module) -> nn.Module | None:
    """A copy of a library model on the CPU, without shards or hooks, on the first rank; None on the others.

    A collective call where the model is sharded.
    """
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.is_initialized() and dist.get_rank() != 0:
        return None
    kind = plain_class(model)
    with init_empty_weights(include_buffers=False):
        copy = kind(model.config) if isinstance(model, PreTrainedModel) else kind.from_config(model.config)
    copy.load_state_dict({name: value.clone() for name, value in weights.items()}, assign=True)
    if isinstance(copy, PreTrainedModel):
        copy.tie_weights()
    return copy
