"""Compiled blocks of a Wan model that trains."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from model.block import CausalWanBlock


def compile_blocks(model: WanTransformer3DModel, kept: Sequence[torch._ops.OpOverload] = (), **options: Any) -> None:
    """Compile the blocks, once for all layers; after sharding and checkpointing are set up. `options` are those of
    `torch.compile`.

    `kept`: operators whose output checkpointing keeps. It then goes inside the blocks, where the compiler knows what
    the backward pass will read: around them it would run all of a block again. Forwards through a cache break a block's
    graph, which cannot be inside, so these are checkpointed around the blocks and run attention again.
    """
    if not (kept and model.is_gradient_checkpointing):
        for block in model.blocks:
            block.compile(**options)
        return

    def plain(block, *arguments):
        return CausalWanBlock.forward(block, *arguments)

    def checkpointed(block, *arguments):
        contexts = partial(create_selective_checkpoint_contexts, kept)
        return checkpoint(partial(CausalWanBlock.forward, block), *arguments, use_reentrant=False, context_fn=contexts)

    around = model._gradient_checkpointing_func
    run, run_checkpointed = (torch.compile(function, **options) for function in (plain, checkpointed))

    def forward(block, x, text, temb, rotation, mask=None, memory=None):
        inside = memory is None and torch.is_grad_enabled()
        return (run_checkpointed if inside else run)(block, x, text, temb, rotation, mask, memory)

    def outside(block, *arguments):
        has_memory = any(argument is not None for argument in arguments[5:])
        return around(block, *arguments) if has_memory else block(*arguments)

    for block in model.blocks:
        block.forward = partial(forward, block)
    model._gradient_checkpointing_func = outside
