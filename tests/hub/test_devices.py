"""Packed models spread by device_map: over two GPUs, and over a GPU and what accelerate offloads."""

import pytest
import torch
from tests.conftest import tiny_llama_config

import signbit
from signbit.linear import PackedLinear

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture
def packed_dir(tmp_path):
    from transformers import LlamaForCausalLM

    config = tiny_llama_config(hidden_size=256, intermediate_size=512, num_hidden_layers=8, vocab_size=512)
    model = LlamaForCausalLM(config)
    signbit.quantize_(model, signbit.SignbitConfig("absmean", group=64, head="int8"))
    return signbit.save(model, tmp_path / "packed")


def load(packed_dir, **kwargs):
    return signbit.load(packed_dir, dtype=torch.float32, **kwargs).eval()


def places(model):
    return {str(device) for device in model.hf_device_map.values()}


def logits(model, mode):
    signbit.set_activations(model, mode)
    ids = torch.arange(3, 15, device=model.get_input_embeddings().weight.device)[None]
    if ids.is_meta:
        ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        return model(ids).logits.cpu()


@pytest.mark.parametrize("mode", ["exact", "int8"])
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_over_two_gpus(packed_dir, mode):
    whole = logits(load(packed_dir, device_map={"": 0}), mode)
    spread = load(packed_dir, device_map="auto")
    assert places(spread) == {"0", "1"}
    layers = [module for module in spread.modules() if isinstance(module, PackedLinear)]
    assert all(layer.prepare() is None for layer in layers)
    assert {layer.prepared[0].signs.device.index for layer in layers} == {0, 1}
    assert {layer.fused is not None for layer in layers if layer.in_features == 256 and layer.out_features == 512} == {
        True
    }
    assert (logits(spread, mode) - whole).abs().max() <= 1e-5 * whole.abs().max()


@pytest.mark.parametrize("mode", ["exact", "int8"])
@pytest.mark.parametrize("other", ["cpu", "disk"])
def test_over_a_gpu_and_what_is_offloaded(packed_dir, tmp_path, other, mode):
    whole = logits(load(packed_dir, device_map={"": 0}), mode)
    blocks = {f"model.layers.{i}": 0 if i < 5 else other for i in range(8)}
    spread = load(
        packed_dir,
        device_map={"model.embed_tokens": 0, "model.rotary_emb": 0, **blocks, "model.norm": 0, "lm_head": 0},
        offload_folder=str(tmp_path / "offload"),
    )
    assert places(spread) == {"0", other}
    layers = {name: module for name, module in spread.named_modules() if isinstance(module, PackedLinear)}
    reasons = {name: layer.prepare() for name, layer in layers.items()}
    offloaded = {name for name, reason in reasons.items() if reason is not None}
    assert offloaded == {name for name in layers if int(name.split(".")[2]) >= 5}
    assert all("offloaded by accelerate" in reasons[name] for name in offloaded)
    got = logits(spread, mode)
    assert (got - whole).abs().max() <= 1e-4 * whole.abs().max()


def test_auto_with_little_memory(packed_dir):
    whole = logits(load(packed_dir, device_map={"": 0}), "exact")
    size = sum(file.stat().st_size for file in packed_dir.glob("*.safetensors"))
    spread = load(packed_dir, device_map="auto", max_memory={0: size * 3 // 4, "cpu": 10**9})
    assert places(spread) == {"0", "cpu"}
    assert (logits(spread, "exact") - whole).abs().max() <= 1e-4 * whole.abs().max()
