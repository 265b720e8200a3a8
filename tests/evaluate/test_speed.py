"""Memory and names of speed's records: on a GPU what torch allocated there, elsewhere what the process takes."""

import pytest
import torch
from tests.conftest import tiny_llama_config
from transformers import LlamaForCausalLM

import signbit
from signbit.evaluate import speed
from signbit.evaluate.machines import here
from signbit.hub.subject import Subject, Where


def test_the_peak_is_the_device_s_own(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: asked.append(device) or 5)
    assert speed.peak_bytes("cuda:1") == 5 and asked == ["cuda:1"]
    assert speed.peak_bytes("cpu") >= speed.resident_bytes() > 50e6 and asked == ["cuda:1"]


def test_a_machine_has_the_name_of_its_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"the GPU at {device}")
    assert speed.machine("cuda:1") == "the GPU at cuda:1"
    assert speed.machine("cpu") == f"{here('cpu')['device']}, {torch.get_num_threads()} threads"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_memory_is_what_torch_allocated_there(tmp_path):
    config = tiny_llama_config(hidden_size=512, intermediate_size=2048, num_hidden_layers=4)
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "dense")
    weights = sum(p.nbytes for p in model.parameters())
    signbit.quantize_(model, signbit.SignbitConfig("absmean", group=64))
    signbit.save(model, tmp_path / "packed")
    dense, packed = (
        Subject(name, str(tmp_path / name), Where(device="cuda")).speed(speed.SpeedOptions())
        for name in ("dense", "packed")
    )
    assert dense["before_bytes"] == packed["before_bytes"] == 0
    assert weights < dense["peak_bytes"] < 500e6, "the process itself takes more with CUDA in it"
    assert 0 < packed["peak_bytes"] < dense["peak_bytes"]
    name = torch.cuda.get_device_name("cuda")
    assert {(found["device"], found["machine"]) for found in (dense, packed)} == {("cuda", name)}
    assert (dense["backend"], packed["backend"]) == ("torch", "cuda")
    assert min(found[f"{part}_tokens_per_s"] for found in (dense, packed) for part in ("prefill", "decode")) > 0
