"""Weights of Wan models, which know no compressor, into a model that has one: it is initialised, and that is said."""

import logging
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint
from torch import nn

from model.compressor import COMPRESSORS

log = logging.getLogger(__name__)

COMPRESSOR_PREFIX = "pack_compressor."


class FreshCompressor:
    """The ways of diffusers' models to load, for one with a `pack_compressor`."""

    def _new_compressor(self) -> nn.Module | None:
        config = self.config
        kind, dim = COMPRESSORS[config.compressor], config.num_attention_heads * config.attention_head_dim
        return kind(config.in_channels, config.compressor_channels, dim) if kind.trainable else None

    def fresh_compressor(self, source: Any, seed: int = 0) -> dict[str, torch.Tensor]:
        """Newly initialised parameters of the compressor, by their names in the model; the same for the same seed.

        For weights at `source` that have none, which is logged. The model itself may be on the meta device.
        """
        if self.pack_compressor is None:
            return {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh = self._new_compressor().state_dict(prefix=COMPRESSOR_PREFIX)
        log.warning("%s has no compressor: pack_compressor is initialised at random (seed %d)", source, seed)
        return fresh

    @classmethod
    def _load_pretrained_model(cls, model, state_dict, files, source, loaded_keys, **settings):
        """What `from_pretrained` calls with the weights; a compressor that they lack goes with them."""
        if not any(name.startswith(COMPRESSOR_PREFIX) for name in loaded_keys):
            fresh = model.fresh_compressor(source)
            if state_dict is None:  # in several files
                files = [*files, fresh]
            else:
                state_dict = {**state_dict, **fresh}
        return super()._load_pretrained_model(model, state_dict, files, source, loaded_keys, **settings)

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path_or_dict=None, **kwargs) -> Any:
        """As `WanTransformer3DModel.from_single_file`; a compressor that the file lacks is initialised anew."""
        source = pretrained_model_link_or_path_or_dict
        if isinstance(source, dict):
            weights, source = dict(source), "the given state dict"
        else:
            names = ("force_download", "proxies", "token", "cache_dir", "local_files_only", "revision", "disable_mmap")
            weights = load_single_file_checkpoint(source, **{name: kwargs[name] for name in names if name in kwargs})
        if not any(COMPRESSOR_PREFIX in name for name in weights):
            config, subfolder = kwargs.get("config"), kwargs.get("subfolder")
            if config is None:
                config, subfolder = fetch_diffusers_config(weights)["pretrained_model_name_or_path"], "transformer"
            hub = {name: kwargs[name] for name in ("local_files_only", "token") if name in kwargs}
            settings = cls.load_config(config, subfolder=subfolder, revision=kwargs.get("config_revision"), **hub)
            own = {name: kwargs[name] for name in cls._get_signature_keys(cls)[1] if name in kwargs}
            with init_empty_weights():
                model = cls.from_config({**settings, **own})
            weights |= model.fresh_compressor(source)
        return super().from_single_file(weights, **kwargs)
