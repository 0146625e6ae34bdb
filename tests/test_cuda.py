"""What a GPU does otherwise than a CPU, against the CPU in float32: kernels, dtypes, pinned memory, sharding. Marked
`cuda`; without a GPU the same code runs on the CPU."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from diffusers.models.attention_dispatch import AttentionBackendName
from torch._dynamo.utils import counters
from torch.nn.functional import gelu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from model.attention import TanhGELU, attend, best_backend, can_fuse, clip_mask, matmul_attention
from pipeline.train import roles
from pipeline.train.compiled import compile_blocks
from pipeline.train.parallel import shard_model
from tests.toy import CHANNELS, LATENT, randn, toy_cache, toy_chunk, toy_config, toy_model, toy_prompt
from utils.config import Config

pytestmark = pytest.mark.cuda
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
BF16 = 0.03  # of the largest value: eight bits of mantissa through two layers
BACKENDS = sorted({AttentionBackendName.NATIVE.value, best_backend(DEVICE), best_backend(DEVICE, trains=True)})


@pytest.fixture(scope="module", autouse=True)
def nothing_stays_compiled():
    """With it the compiler would keep a thousand tensors that stand for others."""
    yield
    torch.compiler.reset()


class OperationCounter(TorchDispatchMode):
    """Calls of some operators."""

    def __init__(self, names):
        super().__init__()
        self.names, self.calls = names, 0

    @classmethod
    def ignore_compile_internals(cls):
        return True  # or what is compiled would not run so in here

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func.name().split(".")[0] in self.names
        return func(*args, **kwargs or {})


def close(ours: torch.Tensor, theirs: torch.Tensor, allowed: float) -> None:
    error = (ours.float().cpu() - theirs).abs().max()
    assert error <= allowed * theirs.abs().max(), f"{error} of {theirs.abs().max()}"


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_equal_plain_products(backend, grad):
    query, key, value = (randn(2, size, 4, 64, seed=i) for i, size in enumerate((96, 320, 320)))
    expected = matmul_attention(query, key, value)
    ours = (x.to(DEVICE, torch.bfloat16) for x in (query, key, value))
    with torch.set_grad_enabled(grad):
        close(attend(*ours, backend), expected, BF16)


@torch.no_grad()
def test_gelu_at_the_end_of_a_product():
    layer = TanhGELU(32, 96, approximate="tanh").to(DEVICE, torch.bfloat16)
    x = randn(2, 24, 32, seed=0).to(DEVICE, torch.bfloat16)
    assert can_fuse(layer.proj, x)
    close(layer(x), gelu(layer.proj(x).float(), approximate="tanh").cpu(), BF16)
    assert not can_fuse(layer.proj, x.float())
    with torch.enable_grad():
        assert not can_fuse(layer.proj, x)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert not can_fuse(layer.proj, x)
    hook = layer.proj.register_forward_hook(lambda *_: None)
    assert not can_fuse(layer.proj, x)
    hook.remove()
    layer.add_module("proj", torch.nn.Sequential(layer.proj))  # as adapters do
    assert not can_fuse(layer.proj, x)


def test_the_block_mask_equals_the_boolean_one():
    query, key, value = (randn(1, 96, 2, 64, seed=i) for i in range(3))
    expected = matmul_attention(query, key, value, clip_mask(4, 12, 2, True, torch.device("cpu")))
    mask = clip_mask(4, 12, 2, True, DEVICE)
    close(attend(*(x.to(DEVICE) for x in (query, key, value)), None, mask), expected, 2e-3)


@torch.no_grad()
def rolled_out(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Flows of seven chunks with history, sink, mid and recent, from given latents."""
    model = toy_model().to(device, dtype)
    cache, prompt, flows = toy_cache(model, toy_config()), toy_prompt().to(device, dtype), []
    for index in range(7):
        context, latents = cache.context(), toy_chunk(index).to(device, dtype)
        flows.append(model(latents, torch.tensor([500.0], device=device), prompt, context=context).sample)
        clean = model(latents, torch.tensor([0.0], device=device), prompt, context=context)
        cache.commit(clean.kv, context)
    return torch.stack(flows).float().cpu()


def test_chunks_with_an_archive_in_host_memory():
    expected = rolled_out(torch.device("cpu"), torch.float32)
    close(rolled_out(DEVICE, torch.float32), expected, 2e-3)  # TF32 where it is allowed
    close(rolled_out(DEVICE, torch.bfloat16), expected, 2 * BF16)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_sharded_weights_on_one_rank(tmp_path, compiled):
    """Compiled blocks: as in training, after sharding and under checkpointing."""
    clip, text = randn(1, CHANNELS, 6, *LATENT, seed=0), toy_prompt()

    def gradient(model, device):
        out = model(clip.to(device), torch.tensor([500.0], device=device), text.to(device)).sample
        out.square().mean().backward()
        grad = model.blocks[0].attn1.to_k.weight.grad
        return getattr(grad, "full_tensor", lambda: grad)().cpu()

    expected = gradient(toy_model(), torch.device("cpu"))
    backend, meet = "nccl" if ON_GPU else "gloo", f"file://{tmp_path / 'ranks'}"
    dist.init_process_group(backend, init_method=meet, rank=0, world_size=1)
    try:
        model, mesh = toy_model(), dist.device_mesh.init_device_mesh(DEVICE.type, (1,))
        shard_model(model, mesh, "no", DEVICE)
        if compiled:
            model.train().enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False))
            for block in model.blocks:
                block.compile(backend="inductor" if ON_GPU else "aot_eager")
        torch.compiler.reset()  # what other tests compiled would do here too, and nothing new would be counted
        graphs = counters["stats"]["unique_graphs"]
        close(gradient(model.to(DEVICE), DEVICE), expected, 5e-3)
        assert not compiled or counters["stats"]["unique_graphs"] > graphs
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("compiled", [False, True])
def test_what_attention_gave_is_kept_under_checkpointing(monkeypatch, compiled):
    kept, config, text = {"aten::bmm", *roles.ATTENTION}, Config(), toy_prompt()
    monkeypatch.setattr(roles, "ATTENTION", kept)  # bmm: what a CPU attends by
    clips, calls, gradients = [randn(1, CHANNELS, 6, *LATENT, seed=seed) for seed in range(2)], [], []
    for keeps in (False, True):
        graphs = counters["stats"]["unique_graphs"]
        monkeypatch.setattr(roles, "keeps_attention", lambda *_, keeps=keeps: keeps)
        config.train.compile = compiled
        model = roles.prepare(toy_model().train(), config, DEVICE).to(DEVICE)
        if compiled:
            torch.compiler.reset()
            operators = roles.attention_operators() if keeps else ()
            compile_blocks(model, operators, backend="inductor" if ON_GPU else "aot_eager", dynamic=False)
        with torch.autocast(DEVICE.type, torch.bfloat16, cache_enabled=not keeps):
            with torch.no_grad():
                model(clips[0].to(DEVICE), torch.tensor([500.0], device=DEVICE), text.to(DEVICE))
            out = model(clips[1].to(DEVICE), torch.tensor([500.0], device=DEVICE), text.to(DEVICE)).sample
        with OperationCounter(kept) as counter:
            out.float().square().mean().backward()
        assert not compiled or counters["stats"]["unique_graphs"] > graphs
        calls.append(counter.calls)
        gradients.append(model.blocks[0].attn1.to_k.weight.grad.float().cpu())
    close(gradients[1], gradients[0], 1e-2 * ON_GPU)
    assert calls[1] < calls[0]


def test_chunks_of_a_cache_train_compiled_blocks_that_keep_attention(monkeypatch):
    monkeypatch.setattr(roles, "ATTENTION", ("aten::bmm", *roles.ATTENTION))
    text, gradients = toy_prompt().to(DEVICE), []
    for compiled in (False, True):
        model = roles.prepare(toy_model().train(), Config(), DEVICE).to(DEVICE)
        if compiled:
            torch.compiler.reset()
            compile_blocks(model, roles.attention_operators(), backend="inductor" if ON_GPU else "aot_eager")
        cache = toy_cache(model, toy_config())
        for index in range(2):
            context, latents = cache.context(), toy_chunk(index).to(DEVICE)
            out = model(latents, torch.tensor([500.0], device=DEVICE), text, context=context)
            with torch.no_grad():
                cache.commit(model(latents, torch.tensor([0.0], device=DEVICE), text, context=context).kv, context)
        out.sample.square().mean().backward()
        gradients.append(model.blocks[0].attn1.to_k.weight.grad.cpu())
    close(gradients[1], gradients[0], 1e-2)
