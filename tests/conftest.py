"""What several test modules start from."""

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from distill import write_world
from tiny import write_bundle

torch.set_num_threads(1)  # a core for each of the processes that share the tests


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    """Random models; nobody changes them."""
    return write_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A world to distil in, the module's own."""
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def diffusers_backend(monkeypatch):
    """What `set_attention_backend` of one model makes the default of all others is undone after the test."""
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)
