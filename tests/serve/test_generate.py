import copy
from types import SimpleNamespace

import pytest
import torch

import signbit
from signbit.errors import OptionError
from signbit.serve import GenerateOptions, chat, generate


@pytest.fixture
def model(llama):
    signbit.quantize_(llama, signbit.SignbitConfig())
    return llama


def test_greedy_equals_transformers_generate(model, tokenizer):
    result = generate(model, tokenizer, "w3 w4", GenerateOptions(max_new_tokens=7))
    ids = tokenizer("w3 w4", return_tensors="pt").input_ids
    want = model.generate(ids, max_new_tokens=7, do_sample=False)[0, 2:]
    assert result.text.split() == tokenizer.decode(want, skip_special_tokens=True).split()
    assert result.new_tokens == len(want)
    assert not result.stopped


def test_the_text_is_streamed_in_pieces(model, tokenizer):
    pieces = []
    result = generate(model, tokenizer, "w3", GenerateOptions(max_new_tokens=6), pieces.append)
    assert len([p for p in pieces if p]) > 1
    assert "".join(pieces) == result.text


@pytest.fixture
def spaced():
    """A LLaMA tokenizer, which drops the blank before the first token that it decodes; <0x0A> is the end of a line."""
    from transformers import LlamaTokenizer

    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        "a",
        "b",
        "\u2581a",
        "\u2581b",
    ]
    made = LlamaTokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=[("\u2581", "a"), ("\u2581", "b")], add_bos_token=True
    )
    made.chat_template = "{{ messages[-1]['content'] }}"
    return made


def writes(words, tokenizer):
    """A model that writes these tokens, one after the other."""

    def generate(input_ids, streamer, stopping_criteria, **kwargs):
        streamer.put(input_ids)
        for i in tokenizer.convert_tokens_to_ids(words):
            streamer.put(torch.tensor([i]))
            stopping_criteria(input_ids, None)
        streamer.end()

    config = SimpleNamespace(vocab_size=1 << 20)
    config.get_text_config = lambda: config
    return SimpleNamespace(config=config, device="cpu", generate=generate)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["\u2581b", "\u2581a"], " b a"),
        (["b", "\u2581a", "</s>"], "b a"),
        (["<0x0A>", "</s>", "\u2581", "\u2581a", "<0x0A>", "\u2581b"], "\n  a\n b"),  # indented
        (["<0xC3>", "<0xA9>", "\u2581b"], "\u00e9 b"),
        (["<0xE4>", "<0xB8>", "<0xAD>", "\u2581b", "a"], "\u4e2d ba"),  # a Chinese character is written at once
    ],
)
@pytest.mark.parametrize("prompt", ["a b", "a\n", "a " * 100 + "b", "\u00e9" * 70])
def test_the_blanks_that_a_llama_writes_are_kept(spaced, prompt, words, text):
    pieces = []
    result = generate(writes(words, spaced), spaced, prompt, GenerateOptions(), pieces.append)
    assert result.text == "".join(pieces) == text


def test_an_answer_begins_without_the_blank_of_its_first_word(spaced):
    model = writes(["\u2581b", "<0x0A>", "\u2581a", "</s>"], spaced)
    assert generate(model, spaced, [{"role": "user", "content": "a"}]).text == "b\n a"


def test_a_trained_llama_goes_on_from_its_prompt(stories):
    from signbit.hub.load import load_any, load_tokenizer

    model, tokenizer = load_any(stories), load_tokenizer(stories)
    text = generate(model, tokenizer, "The weather was", GenerateOptions(max_new_tokens=40)).text
    ids = model.generate(**tokenizer("The weather was", return_tensors="pt"), max_new_tokens=40, do_sample=False)[0]
    assert f"The weather was{text}" == tokenizer.decode(ids, skip_special_tokens=True)
    assert text.startswith(" ")


def test_a_seed_repeats(model, tokenizer):
    options = [GenerateOptions(max_new_tokens=12, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    texts = [generate(model, tokenizer, "w3", o).text for o in options]
    assert texts[0] == texts[1] != texts[2]


def test_the_lowest_temperatures_are_greedy(model, tokenizer):
    texts = {
        generate(model, tokenizer, "w3", GenerateOptions(12, temperature)).text for temperature in (0, 1e-300, 1e-40)
    }
    assert len(texts) == 1


def test_ctrl_c_ends_the_answer_and_keeps_what_was_written(model, tokenizer):
    pieces = []

    def interrupt(text):
        pieces.append(text)
        if len([p for p in pieces if p]) == 3:
            raise KeyboardInterrupt

    result = generate(model, tokenizer, "w3", GenerateOptions(max_new_tokens=50), interrupt)
    assert result.stopped
    assert result.text == "".join(pieces)


def test_messages_go_through_the_chat_template(model, tokenizer, monkeypatch):
    seen = []
    real = model.generate
    monkeypatch.setattr(model, "generate", lambda **k: seen.append(k["input_ids"]) or real(**k))
    generate(model, tokenizer, [{"role": "user", "content": "w5"}], GenerateOptions(max_new_tokens=1))
    assert tokenizer.decode(seen[0][0]).split() == ["<unk>", "w5", "</s>", "w1"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens is 0"),
        ({"temperature": -1.0}, "--temperature is -1"),
        ({"top_p": 0.0}, "--top-p"),
        ({"top_k": -1}, "--top-k"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_options(values, message):
    with pytest.raises(OptionError, match=message):
        GenerateOptions(**values)


def test_prompts_that_cannot_be(model, tokenizer):
    with pytest.raises(OptionError, match="the prompt is empty"):
        generate(model, tokenizer, "")
    with pytest.raises(OptionError, match="the prompt has no token of the model's tokenizer"):
        generate(model, tokenizer, "  ")
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["w61"])
    with pytest.raises(OptionError, match=r"has the token 64, and the model's embedding has 64 rows \(ids 0 to 63\)"):
        generate(model, larger, "w3 w61")
    with pytest.raises(OptionError, match="the prompt has 128 tokens, the model's context 128"):
        generate(model, tokenizer, " ".join(["w3"] * 128))
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(OptionError, match="no chat template, so it cannot chat; use signbit generate"):
            generate(model, tokenizer, [{"role": "user", "content": "w1"}])
    finally:
        tokenizer.chat_template = template


def test_the_context_is_never_passed(model, tokenizer):
    result = generate(model, tokenizer, " ".join(["w3"] * 120), GenerateOptions(max_new_tokens=50))
    assert result.new_tokens <= 8
    assert result.context_full == (result.new_tokens == 8)


def test_a_learned_position_table_is_never_passed(tokenizer):
    from tests.families import gpt2

    result = generate(gpt2(), tokenizer, " ".join(["w3"] * 100), GenerateOptions(max_new_tokens=200))
    assert result.new_tokens <= 28


def test_what_the_template_refuses_is_said_and_the_chat_goes_on(model, tokenizer):
    template = tokenizer.chat_template
    tokenizer.chat_template = "{% if 'w9' in messages[-1]['content'] %}{{ raise_exception('no w9') }}{% endif %}w3"
    shown = []
    try:
        chat(model, tokenizer, GenerateOptions(max_new_tokens=1), None, script("w9", "w4", "/exit"), shown.append)
    finally:
        tokenizer.chat_template = template
    text = "".join(shown)
    assert "no w9" in text
    assert "/clear starts a new conversation]" in text


def test_chat_without_a_template_is_refused_at_once(model, tokenizer):
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(OptionError, match="no chat template"):
            chat(model, tokenizer, GenerateOptions(), None, script())
    finally:
        tokenizer.chat_template = template


def script(*lines):
    """An input() that reads `lines`, raising those that are exceptions."""
    left = list(lines)

    def read(prompt):
        line = left.pop(0)
        if isinstance(line, type):
            raise line
        return line

    return read


def test_a_chat_remembers_clears_and_ends(model, tokenizer, monkeypatch):
    seen = []
    real = model.generate
    monkeypatch.setattr(model, "generate", lambda **k: seen.append(k["input_ids"].shape[1]) or real(**k))
    shown = []
    read = script("w3", "", "w4", KeyboardInterrupt, "/clear", "w3", EOFError)
    chat(model, tokenizer, GenerateOptions(max_new_tokens=2), None, read, shown.append)
    assert seen[0] == seen[2] == 4
    assert seen[1] > seen[0] + 3, "the second question carries the first and its answer"
    text = "".join(shown)
    assert text.count("/clear starts a new conversation") == 2, "once at the start, once for Ctrl-C at the prompt"


def test_ctrl_c_in_an_answer_does_not_end_the_chat(model, tokenizer):
    shown, interrupted = [], []

    def write(text):
        shown.append(text)
        if text.startswith("w") and not interrupted:
            interrupted.append(text)
            raise KeyboardInterrupt

    chat(model, tokenizer, GenerateOptions(max_new_tokens=5), "w9", script("w3", "w4", "/exit"), write)
    assert interrupted
    assert [s for s in shown if "[stopped]" in s] == [" [stopped]\n"], "the second answer came to its end"


def test_half_precision_on_the_cpu(model, tokenizer):
    text = generate(model.to(torch.bfloat16), tokenizer, "w3", GenerateOptions(max_new_tokens=3)).text
    assert text
