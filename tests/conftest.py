"""Small models and tokenizers that the tests make, and ../shared where it is there."""

import gc
import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True, scope="module")
def _old_objects_are_not_searched_again():
    """Quantizing collects garbage at each block; in this process that would go through all that other tests imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _nothing_is_kept_from_before(tmp_path_factory):
    """What earlier runs measured, on this machine's kernels of then, is no result of these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIGNBIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared():
    """The folder ../shared of the workplace, with its data and models."""
    if not SHARED.is_dir():
        pytest.skip("../shared is not there")
    return SHARED


@pytest.fixture(scope="session")
def stories(shared):
    """A really trained Llama of 260K parameters (K = 64 and 172), as a directory."""
    return str(shared / "models" / "stories260K")


@pytest.fixture(scope="session")
def tokenizer():
    """A word-level tokenizer of 64 tokens with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(61))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    made.chat_template = (
        "{% for m in messages %}{{ m['role'][0:1] }} {{ m['content'] }} </s>{% endfor %}"
        "{% if add_generation_prompt %}w1 {% endif %}"
    )
    return made


@pytest.fixture
def chosen_anew(monkeypatch):
    """The instruction set is chosen and checked by this test, and again by what asks next."""
    from signbit.ops import cpu

    monkeypatch.delenv(cpu.VARIABLE, raising=False)
    cpu.selected.cache_clear()
    yield
    cpu.selected.cache_clear()


def tiny_llama_config(**changes):
    from transformers import LlamaConfig

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**{**sizes, **changes})


@pytest.fixture
def llama():
    """A random Llama with tied embeddings (hidden 32, ffn 72, two blocks)."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(tiny_llama_config()).eval()


@pytest.fixture
def llama_dir(llama, tokenizer, tmp_path):
    """The same as a directory with its tokenizer."""
    out = tmp_path / "llama"
    llama.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return str(out)


@pytest.fixture
def ids():
    return torch.tensor([[3, 5, 7, 11, 13, 17]])
