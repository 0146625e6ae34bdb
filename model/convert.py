"""Parameter names of a text-to-video Wan DiT: Wan2.1's own layout <-> diffusers' `WanTransformer3DModel`.

One table, read in both directions. Names that are in neither column raise instead of passing through, so that a
checkpoint of something else is noticed. The compressor (`pack_compressor.net.N`) has the same name in both layouts.
"""

import re
from collections.abc import Iterable

_KINDS = ("weight", "bias")
# Layers, Wan2.1 original -> diffusers, outside the blocks.
_TOP_LAYERS = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
}
# The same inside `blocks.N.`; the affine norm before cross-attention is norm3 in Wan, norm2 in diffusers.
_BLOCK_LAYERS = {"norm3": "norm2", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}
_ATTENTIONS = {"self_attn": "attn1", "cross_attn": "attn2"}
_PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
for _wan, _diffusers in _ATTENTIONS.items():
    _BLOCK_LAYERS |= {f"{_wan}.{name}": f"{_diffusers}.{ours}" for name, ours in _PROJECTIONS.items()}

_TOP, _BLOCK = (
    {f"{wan}.{kind}": f"{diffusers}.{kind}" for wan, diffusers in layers.items() for kind in _KINDS}
    for layers in (_TOP_LAYERS, _BLOCK_LAYERS)
)
_TOP["head.modulation"] = _BLOCK["modulation"] = "scale_shift_table"
for _wan, _diffusers in _ATTENTIONS.items():  # whose norms have no bias
    _BLOCK |= {f"{_wan}.{norm}.weight": f"{_diffusers}.{norm}.weight" for norm in ("norm_q", "norm_k")}
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
