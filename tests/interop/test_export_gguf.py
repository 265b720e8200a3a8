"""GGUF files as llama.cpp runs them: logits, text and tokens beside transformers'; and back by `signbit import`."""

import math
from pathlib import Path

import pytest
import torch
from demo.smollm2 import NAME, cache
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import signbit
from signbit.cli import main
from signbit.errors import ExportError
from signbit.interop.export.request import ExportRequest
from signbit.interop.export.run import export
from signbit.linear import PackedLinear
from tests.conftest import tiny_llama_config
from tests.interop import llamacpp

TEXT = Path(signbit.__file__).parent / "data" / "texts"
NEAR = 1e-3
PROMPT = [72, 105, 220, 33, 34, 35]


def byte_level(steps=None, size=300):
    """A byte-level BPE that is trained on a text of the package."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    # Pieces of several digits, which the ways to split text treat differently.
    tokenizer.train_from_iterator([text(), " 12 123 1234 5678" * 500], trainer)
    tokenizer.pre_tokenizer = steps or tokenizer.pre_tokenizer
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    made.chat_template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    return made


def text():
    return next(TEXT.glob("*.txt")).read_text(encoding="utf-8")[:40_000]


def trained(model, tokenizer, steps=300):
    ids = torch.tensor(tokenizer(text(), add_special_tokens=False)["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        starts = torch.randint(0, len(ids) - 33, (4,)).tolist()
        batch = torch.stack([ids[i : i + 32] for i in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


@torch.no_grad()
def with_norms(model):
    """Norms of random weights: where all are 1, numbers of an 8-bit embedding lie halfway between two of 8 bits again."""
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory):
    """A Llama of hidden 256 and ffn 512 that has learnt a little, in float16."""
    torch.manual_seed(0)
    folder, tokenizer = tmp_path_factory.mktemp("llama") / "small-llama", byte_level()
    model = LlamaForCausalLM(config(len(tokenizer)))
    assert trained(model, tokenizer) < 4.5  # log 300 = 5.7
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def config(vocabulary, **changes):
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "vocab_size": vocabulary,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return tiny_llama_config(**{**sizes, "tie_word_embeddings": False, "max_position_embeddings": 256, **changes})


@pytest.fixture(scope="module")
def packed(llama_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "small"
    assert main(["quantize", llama_dir, "-o", str(out), "--method", "absmean", "--group", "128", "--head", "int8"]) == 0
    return str(out)


def gguf_in(folder):
    """The model's file and the adapter's."""
    adapter = next(iter(folder.glob("*-lora.gguf")), None)
    return next(file for file in folder.glob("*.gguf") if file != adapter), adapter


def relative(got, want):
    """The largest difference of logits, which are known but for a constant, by their largest."""
    got, want = got - got.mean(dim=-1, keepdim=True), want - want.mean(dim=-1, keepdim=True)
    return float((got - want).abs().max() / want.abs().max())


@torch.no_grad()
def compare(model, folder, tokens=16, close=1e-3, round_=True):
    """How many greedy tokens llama.cpp and `model` with llama.cpp's activations write alike, until two are near.

    At each their logits are `close`.
    """
    exact = model(torch.tensor([PROMPT])).logits[0, -1]
    if round_:
        llamacpp.with_its_rounding(model)
    path, adapter = gguf_in(folder)
    ids = list(PROMPT)
    with llamacpp.running(path, adapter) as server:
        while len(ids) < len(PROMPT) + tokens:
            answer = llamacpp.next_token(server, ids, model.config.vocab_size)
            if answer is None:
                assert len(ids) > len(PROMPT), "nothing was compared"
                break
            token, got = answer
            want = model(torch.tensor([ids])).logits[0, -1]
            assert relative(got, want) < close
            assert (
                not round_ or len(ids) > len(PROMPT) or relative(got, exact) > close
            )  # else rounding would not be seen
            first, second = want.topk(2).values.tolist()
            if first - second < NEAR:
                break
            assert token == int(want.argmax())
            ids.append(token)
    return len(ids) - len(PROMPT)


def same_layers(packed, again):
    one, other = signbit.load(packed, dtype=torch.float32), signbit.load(again, dtype=torch.float32)
    layers = {name: module for name, module in one.named_modules() if isinstance(module, PackedLinear)}
    assert layers
    for name, layer in layers.items():
        for mine, theirs in zip(layer.weights, other.get_submodule(name).weights, strict=True):
            assert torch.equal(mine.to_dense(), theirs.to_dense()), name
    return one, other


def test_a_trained_llama_runs_in_llama_cpp_as_in_torch(packed, tmp_path):
    assert main(["export", packed, "--format", "gguf", "-o", str(tmp_path / "out")]) == 0
    assert compare(signbit.load(packed, dtype=torch.float32), tmp_path / "out") >= 8
    assert gguf_in(tmp_path / "out")[0].name == "small-Q1_0-1.125bpw.gguf"


def test_q1_0_and_back_is_the_same_model(packed, tmp_path, capsys):
    export(packed, tmp_path / "out", ExportRequest("gguf"))
    assert main(["import", str(tmp_path / "out"), "-o", str(tmp_path / "again")]) == 0
    one, other = same_layers(packed, tmp_path / "again")
    ids = torch.tensor([PROMPT])
    assert torch.equal(one.lm_head.to_dense(), other.lm_head.weight)
    with torch.no_grad():
        assert relative(other(ids).logits, one(ids).logits) < 1e-5
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "again"), "The", "--max-new-tokens", "4"]) == 0
    mine = AutoTokenizer.from_pretrained(packed)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert theirs(text()[:2000])["input_ids"] == mine(text()[:2000])["input_ids"]
    assert theirs.chat_template == mine.chat_template
    assert len(theirs) == len(mine) == one.config.vocab_size  # transformers' GGUF reader would add <|endoftext|>
    export(tmp_path / "again", tmp_path / "second", ExportRequest("gguf"))
    assert main(["import", str(tmp_path / "second"), "-o", str(tmp_path / "third")]) == 0
    same_layers(packed, tmp_path / "third")


def test_heads_that_were_not_8_bits_are_so_said_and_kept_on_request(llama_dir, tmp_path):
    main(["quantize", llama_dir, "-o", str(tmp_path / "p"), "--method", "absmean"])
    notes = []
    export(tmp_path / "p", tmp_path / "q8", ExportRequest("gguf"), note=notes.append)
    assert any("lm_head" in line and "--head keep" in line for line in notes)
    notes.clear()
    export(tmp_path / "p", tmp_path / "kept", ExportRequest("gguf", head="keep"), note=notes.append)
    assert not notes
    main(["import", str(tmp_path / "kept"), "-o", str(tmp_path / "again")])
    one, other = same_layers(tmp_path / "p", tmp_path / "again")
    assert torch.equal(one.lm_head.weight.float(), other.lm_head.weight.float())
    assert torch.equal(one.model.embed_tokens.weight.float(), other.model.embed_tokens.weight.float())


def test_qwen3_of_random_weights(tmp_path):
    tokenizer = byte_level()
    values = config(len(tokenizer)).to_dict() | {"head_dim": 32, "model_type": "qwen3", "initializer_range": 0.1}
    model = with_norms(Qwen3ForCausalLM(Qwen3Config(**values)))
    model.half().save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    main(["quantize", str(tmp_path / "m"), "-o", str(tmp_path / "p"), "--method", "absmean", "--head", "int8"])
    export(tmp_path / "p", tmp_path / "out", ExportRequest("gguf"))
    assert compare(signbit.load(tmp_path / "p", dtype=torch.float32), tmp_path / "out", tokens=6) >= 2
    main(["import", str(tmp_path / "out"), "-o", str(tmp_path / "again")])
    same_layers(tmp_path / "p", tmp_path / "again")


@pytest.mark.parametrize("kind", [LlamaForCausalLM, MistralForCausalLM])
def test_biases_and_mistral_and_back(kind, tmp_path):
    tokenizer = byte_level()
    values = config(len(tokenizer), initializer_range=0.1, mlp_bias=True, attention_bias=True).to_dict()
    values |= {"sliding_window": None, "model_type": kind.config_class.model_type}
    model = with_norms(kind(kind.config_class(**values)))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)  # transformers starts them at 0, where losing one would not be seen
    model.half().save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    main(["quantize", str(tmp_path / "m"), "-o", str(tmp_path / "p"), "--method", "absmean", "--head", "int8"])
    export(tmp_path / "p", tmp_path / "out", ExportRequest("gguf"))
    compare(signbit.load(tmp_path / "p", dtype=torch.float32), tmp_path / "out", tokens=2)
    assert main(["import", str(tmp_path / "out"), "-o", str(tmp_path / "again")]) == 0
    one, other = same_layers(tmp_path / "p", tmp_path / "again")
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        assert relative(other(ids).logits, one(ids).logits) < 1e-3  # biases of float32 are rounded to float16


def test_k_of_576_is_refused_by_layer_and_k_and_approximated(tmp_path, capsys):
    tokenizer = byte_level()
    sizes = {"hidden_size": 576, "intermediate_size": 256, "num_attention_heads": 9, "num_key_value_heads": 3}
    LlamaForCausalLM(config(len(tokenizer), **sizes)).half().save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    refused_and_approximated(str(tmp_path / "m"), tmp_path, capsys)


SMOLLM2 = cache() / NAME


@pytest.mark.slow
def test_smollm2_is_refused_by_layer_and_k_and_approximated(tmp_path, capsys):
    if not SMOLLM2.is_dir():
        pytest.skip("SmolLM2 is not there: make demo makes it")
    refused_and_approximated(str(SMOLLM2), tmp_path, capsys)
    model = AutoTokenizer.from_pretrained(SMOLLM2)
    with llamacpp.running(gguf_in(tmp_path / "out")[0]) as server:
        for words in TRICKY:
            assert llamacpp.tokenize(server, words) == model(words)["input_ids"]


def refused_and_approximated(source, folder, capsys):
    packed, out = str(folder / "p"), str(folder / "out")
    assert main(["quantize", source, "-o", packed, "--method", "absmean", "--group", "64"]) == 0
    assert main(["export", packed, "--format", "gguf", "-o", out]) == 1
    said = capsys.readouterr().err
    assert "self_attn.q_proj" in said and "K = 576" in said and "--approximate" in said and "--format dense" in said
    assert not Path(out).exists()
    assert main(["export", packed, "--format", "gguf", "-o", out, "--approximate", "--head", "keep"]) == 0
    model = signbit.load(packed, dtype=torch.float32)
    compare(model, Path(out), tokens=3, close=1e-2, round_=False)
    assert "-F16-16.000bpw" in gguf_in(Path(out))[0].name
    assert main(["export", packed, "--format", "gguf", "-o", out, "--overwrite", "--approximate",
                 "--approximate-type", "q8_0"]) == 0  # fmt: skip
    assert "Q8_0-8.500bpw" in gguf_in(Path(out))[0].name
    compare(model, Path(out), tokens=1, close=5e-2, round_=False)


TRICKY = [
    "Hello  world", " leading", "1234 5 678 12 5678", "it's they'LL", "a\n\n b\t\tc", "naïve café 日本語 🙂", "x=y+1;//z", "",
    " ", "<s>hi</s>", "tab\there   three",
]  # fmt: skip


def splits():
    from tokenizers import Regex, pre_tokenizers

    from signbit.interop.export.vocabulary import _SPLITS

    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made = {
        name: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(expression), "isolated"), byte])
        for expression, name in _SPLITS.items()
    }
    digits = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return {**made, "gpt-2": None, "smollm": digits}


@pytest.mark.parametrize("split", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_tokens_are_the_same_in_llama_cpp(split, tmp_path):
    tokenizer = byte_level(splits()[split])
    file_of(tokenizer, tmp_path)
    with llamacpp.running(gguf_in(tmp_path / "g")[0]) as server:
        for words in (*TRICKY, text()[:3000]):
            assert llamacpp.tokenize(server, words) == tokenizer(words)["input_ids"], words


def test_tokens_of_sentencepiece(stories, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(stories)
    file_of(tokenizer, tmp_path)
    with llamacpp.running(gguf_in(tmp_path / "g")[0]) as server:
        for words in ("Once upon a time", "Lily  went\n out, 12 é 🙂", text()[:3000]):
            assert llamacpp.tokenize(server, words) == tokenizer(words)["input_ids"], words


def file_of(tokenizer, folder):
    model = LlamaForCausalLM(config(len(tokenizer), num_hidden_layers=1))
    model.save_pretrained(folder / "m")
    tokenizer.save_pretrained(folder / "m")
    main(["quantize", str(folder / "m"), "-o", str(folder / "p"), "--method", "absmean"])
    export(folder / "p", folder / "g", ExportRequest("gguf"))


def test_a_tokenizer_that_llama_cpp_has_not_is_refused(tokenizer, tmp_path):
    with pytest.raises(ExportError, match=r"the tokenizer is WordLevel; .*convert_hf_to_gguf"):
        file_of(tokenizer, tmp_path)


def with_rope(folder, **scaling):
    """A packed Llama with these rotary positions."""
    tokenizer = byte_level()
    parameters = {"factor": 4.0, "rope_theta": 10000.0, **scaling}
    if scaling["rope_type"] != "linear":
        parameters["original_max_position_embeddings"] = 32
    values = config(len(tokenizer), rope_parameters=parameters, initializer_range=0.1)
    with_norms(LlamaForCausalLM(values)).half().save_pretrained(folder / "m")
    tokenizer.save_pretrained(folder / "m")
    main(["quantize", str(folder / "m"), "-o", str(folder / "p"), "--method", "absmean", "--head", "int8"])
    return folder / "p"


@pytest.mark.parametrize("rope", ["llama3", "linear", "yarn"])
def test_rotary_scaling(rope, tmp_path):
    more = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if rope == "llama3" else {}
    packed = with_rope(tmp_path, rope_type=rope, **more)
    export(packed, tmp_path / "out", ExportRequest("gguf"))
    compare(signbit.load(packed, dtype=torch.float32), tmp_path / "out", tokens=2)


@pytest.mark.parametrize(("key", "value"), [("attention_factor", 2.0), ("beta_slow", 4), ("truncate", False)])
def test_settings_of_yarn_that_would_be_lost_are_refused(key, value, tmp_path):
    packed = with_rope(tmp_path, rope_type="yarn", **{key: value})
    with pytest.raises(ExportError, match=rf"yarn with {key} {value}, .*--format dense"):
        export(packed, tmp_path / "out", ExportRequest("gguf"))


def test_settings_of_yarn_that_change_nothing_are_written(tmp_path):
    defaults = {"attention_factor": 1 + 0.1 * math.log(4), "beta_fast": 32, "mscale": 1.0, "truncate": True}
    export(with_rope(tmp_path, rope_type="yarn", **defaults), tmp_path / "out", ExportRequest("gguf"))
