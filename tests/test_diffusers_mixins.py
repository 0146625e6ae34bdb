"""diffusers' own tests of its models, run on CPU on CausalWanModel in its three uses, and on Wan's own model beside it.

They are no part of the package diffusers: DIFFUSERS_SOURCE names a checkout of its source that has them.
"""

import os
import sys
from functools import cache, partial
from tempfile import mkdtemp

import pytest
import torch
from diffusers import ModelMixin, WanTransformer3DModel
from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS
from test_kv_cache import make, roll
from toy import DIMS, toy_chunk, toy_prompt

from model.causal_wan import CausalWanModel
from model.convert import diffusers_to_wan

sys.path += [os.environ[name] for name in ("DIFFUSERS_SOURCE",) if name in os.environ]  # last: it has a `utils` too
os.environ["DIFFUSERS_TEST_DEVICE"] = "cpu"
WITHOUT = "set DIFFUSERS_SOURCE to a checkout of https://github.com/huggingface/diffusers"
testing_utils = pytest.importorskip("tests.testing_utils", reason=WITHOUT)
for _name in ("accelerator", "torch_accelerator", "torch_accelerator_with_training", "hf_token"):
    setattr(testing_utils, f"require_{_name}", lambda tests: tests)  # a CPU and a checkpoint without weights do
mixins = pytest.importorskip("tests.models.testing_utils", reason=WITHOUT)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    """Without what only an accelerator has, copies in streams, and the minutes of inductor."""
    enable = ModelMixin.enable_group_offload

    def without_streams(self, *arguments, use_stream=False, record_stream=False, **settings):
        enable(self, *arguments, **settings)

    monkeypatch.setattr(ModelMixin, "enable_group_offload", without_streams)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


class Wan(mixins.BaseModelTesterConfig):
    model_class = WanTransformer3DModel
    main_input_name = "hidden_states"
    output_shape = (4, 6, 8, 12)

    def get_init_dict(self):
        return dict(DIMS)

    def get_dummy_inputs(self):
        return {
            "hidden_states": toy_chunk(0, frames=6),
            "timestep": torch.tensor([500.0]),
            "encoder_hidden_states": toy_prompt(),
        }


class Plain(Wan):
    model_class = CausalWanModel

    def get_init_dict(self):
        return {**DIMS, "text_len": 7, "frames_per_chunk": 3, "compressor_channels": (6, 8)}


class TeacherForcing(Plain):
    def get_dummy_inputs(self):
        return {**super().get_dummy_inputs(), "clean_hidden_states": toy_chunk(1, frames=6)}


class Chunk(Plain):
    """The sixth of a video; sink, selected mid and recent chunks before it."""

    output_shape = (4, 3, 8, 12)

    def get_dummy_inputs(self):
        with torch.random.fork_rng():  # or a model made afterwards would be another one
            model, memory, _ = make({})
            roll(model, memory, 5)
        return {**super().get_dummy_inputs(), "hidden_states": toy_chunk(5), "context": memory.context()}


class ReadyChunk(Chunk):
    """As a model that is compiled as a whole takes it."""

    @torch.no_grad()
    def get_dummy_inputs(self):
        given = super().get_dummy_inputs()
        return {**given, "context": given["context"].ready(DIMS["num_layers"], torch.device("cpu"))}


class Training(mixins.TrainingTesterMixin):
    def test_gradient_checkpointing_is_applied(self):
        super().test_gradient_checkpointing_is_applied({self.model_class.__name__})


class Memory(mixins.GroupOffloadTesterMixin, mixins.LayerwiseCastingTesterMixin):
    pass


class FasterCache(mixins.FasterCacheTesterMixin):
    FASTER_CACHE_CONFIG = {**mixins.FasterCacheTesterMixin.FASTER_CACHE_CONFIG, "is_guidance_distilled": True}


class TaylorSeerCache(mixins.TaylorSeerCacheTesterMixin):
    TAYLORSEER_CACHE_CONFIG = {
        **mixins.TaylorSeerCacheTesterMixin.TAYLORSEER_CACHE_CONFIG,
        "cache_identifiers": [r"blocks\.\d+\.attn[12]"],
    }


class Compile(mixins.TorchCompileTesterMixin):
    test_compile_works_with_aot = None  # minutes of a C++ compiler


@cache
def wan_folder():
    """Settings of Wan2.1 1.3B as its repository has them, where a single file's are looked for."""
    with torch.device("meta"):
        wan = WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30)
    folder = mkdtemp()
    wan.save_config(f"{folder}/transformer")
    return folder, {name: (tensor.shape, tensor.dtype) for name, tensor in wan.state_dict().items()}


class SingleFile(mixins.SingleFileTesterMixin):
    pretrained_model_kwargs = {"subfolder": "transformer"}

    @property
    def pretrained_model_name_or_path(self):
        return wan_folder()[0]

    @pytest.fixture(autouse=True)
    def without_hub(self, monkeypatch):
        place = {"pretrained_model_name_or_path": wan_folder()[0]}
        monkeypatch.setitem(DIFFUSERS_DEFAULT_PIPELINE_PATHS, "wan-t2v-1.3B", place)
        ignored = [*mixins.single_file.PARAMS_TO_IGNORE, "_class_name"]  # of the repository it is Wan's
        monkeypatch.setattr(mixins.single_file, "PARAMS_TO_IGNORE", ignored)

    def get_dummy_single_file_state_dict(self):
        tensors = wan_folder()[1].items()
        return {diffusers_to_wan(n): torch.empty(shape, dtype=dtype, device="meta") for n, (shape, dtype) in tensors}


TESTERS = [
    mixins.ModelTesterMixin,
    mixins.AttentionTesterMixin,
    mixins.LoraTesterMixin,
    mixins.PyramidAttentionBroadcastTesterMixin,
    mixins.FirstBlockCacheTesterMixin,
    mixins.MagCacheTesterMixin,
    Training,
    Memory,
    FasterCache,
    TaylorSeerCache,
]
CLASSES = [(use, tester) for use in (Wan, Plain, TeacherForcing, Chunk) for tester in TESTERS]
for _use in (Wan, Plain, TeacherForcing, ReadyChunk):
    CLASSES += [(_use, tester) for tester in (Compile, mixins.LoraHotSwappingForModelTesterMixin)]
CLASSES += [(Wan, SingleFile), (Plain, SingleFile)]
for _use, _tester in CLASSES:
    _name = f"Test{_tester.__name__.removesuffix('TesterMixin')}Of{_use.__name__}"
    globals()[_name] = type(_name, (_tester, _use), {})
