"""Parameter names of a text-to-video Wan DiT: Wan2.1's own layout <-> diffusers' `WanTransformer3DModel`.

One table, read in both directions. Names that are in neither column raise instead of passing through, so that a
checkpoint of something else is noticed. The compressor (`pack_compressor.net.N`) has the same name in both layouts.
"""

import re
from collections.abc import Iterable

# Wan2.1 original -> diffusers, outside the blocks.
_TOP = {
    "patch_embedding.weight": "patch_embedding.weight",
    "patch_embedding.bias": "patch_embedding.bias",
    "text_embedding.0.weight": "condition_embedder.text_embedder.linear_1.weight",
    "text_embedding.0.bias": "condition_embedder.text_embedder.linear_1.bias",
    "text_embedding.2.weight": "condition_embedder.text_embedder.linear_2.weight",
    "text_embedding.2.bias": "condition_embedder.text_embedder.linear_2.bias",
    "time_embedding.0.weight": "condition_embedder.time_embedder.linear_1.weight",
    "time_embedding.0.bias": "condition_embedder.time_embedder.linear_1.bias",
    "time_embedding.2.weight": "condition_embedder.time_embedder.linear_2.weight",
    "time_embedding.2.bias": "condition_embedder.time_embedder.linear_2.bias",
    "time_projection.1.weight": "condition_embedder.time_proj.weight",
    "time_projection.1.bias": "condition_embedder.time_proj.bias",
    "head.head.weight": "proj_out.weight",
    "head.head.bias": "proj_out.bias",
    "head.modulation": "scale_shift_table",
}

# The same inside `blocks.N.`; the affine norm before cross-attention is norm3 in Wan, norm2 in diffusers.
_BLOCK = {
    "modulation": "scale_shift_table",
    "norm3.weight": "norm2.weight",
    "norm3.bias": "norm2.bias",
    "ffn.0.weight": "ffn.net.0.proj.weight",
    "ffn.0.bias": "ffn.net.0.proj.bias",
    "ffn.2.weight": "ffn.net.2.weight",
    "ffn.2.bias": "ffn.net.2.bias",
}
for _wan, _diffusers in (("self_attn", "attn1"), ("cross_attn", "attn2")):
    for _projection, _name in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0")):
        for _kind in ("weight", "bias"):
            _BLOCK[f"{_wan}.{_projection}.{_kind}"] = f"{_diffusers}.{_name}.{_kind}"
    for _norm in ("norm_q", "norm_k"):
        _BLOCK[f"{_wan}.{_norm}.weight"] = f"{_diffusers}.{_norm}.weight"

_TOP_BACK = {diffusers: wan for wan, diffusers in _TOP.items()}
_BLOCK_BACK = {diffusers: wan for wan, diffusers in _BLOCK.items()}

_BLOCK_NAME = re.compile(r"(blocks\.\d+\.)(.+)")
_COMPRESSOR_NAME = re.compile(r"pack_compressor\.net\.\d+\.(weight|bias)")

# What FSDP, activation checkpointing and torch.compile put between the parts of a name, and the attribute names under
# which training code holds the network. The first kind occurs anywhere, the second only in front.
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
_HOLDERS = ("module.", "generator.", "model.", "diffusion_model.")


def strip_prefixes(name: str) -> str:
    """`model._fsdp_wrapped_module.blocks.0.x` -> `blocks.0.x`."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    while name.startswith(_HOLDERS):
        name = name.split(".", 1)[1]
    return name


def _translate(name: str, top: dict[str, str], block: dict[str, str]) -> str:
    if name in top:
        return top[name]
    if _COMPRESSOR_NAME.fullmatch(name):
        return name
    match = _BLOCK_NAME.fullmatch(name)
    if match and match[2] in block:
        return match[1] + block[match[2]]
    raise KeyError(name)


def wan_to_diffusers(name: str) -> str:
    """Diffusers' name of a parameter in Wan2.1's layout (prefixes stripped). Raises KeyError for any other name."""
    return _translate(name, _TOP, _BLOCK)


def diffusers_to_wan(name: str) -> str:
    """The inverse of `wan_to_diffusers`. Raises KeyError for names that a t2v `WanTransformer3DModel` lacks."""
    return _translate(name, _TOP_BACK, _BLOCK_BACK)


def is_wan_layout(names: Iterable[str]) -> bool:
    """Whether stripped parameter names follow Wan2.1's own layout (else diffusers'), by the names that differ."""
    only_wan = _TOP.keys() - _TOP.values()
    return any(name in only_wan or ".self_attn." in name or ".cross_attn." in name for name in names)
