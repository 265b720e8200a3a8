"""The Modelfile and README beside a GGUF file, held against the model's own template, tokens and context."""

import re

import pytest
from demo.smollm2 import NAME, cache
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM

from signbit.cli import main
from signbit.interop.export.notes import Written, readme
from signbit.interop.export.ollama import turns
from signbit.interop.export.request import ExportRequest
from signbit.interop.export.run import export
from tests.interop.test_export_gguf import byte_level, config, gguf_in

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}{% else %}{{ raise_exception('no system') }}{% endif %}"
    "{% endfor %}"
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|end|>\n\n' + (m['content'] | trim) + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
#: Not the same text around each message: numbers, and what is different only in a longer conversation.
COUNTING = "{% for m in messages %}{{ loop.index ~ ': ' ~ m['content'] ~ '\n' }}{% endfor %}"
LONGER = "{% for m in messages %}{{ m['role'] ~ ('; ' if loop.index > 3 else ': ') ~ m['content'] ~ '\n' }}{% endfor %}"
TEMPLATES = {"chatml": CHATML, "inst": INST, "headers": HEADERS}

TALKS = [
    [("user", "Hi there")],
    [("user", "Hi"), ("assistant", "Hello."), ("user", "And\nnow?")],
    [
        ("system", "You are a pirate"),
        ("user", "Hi"),
        ("assistant", "Arr"),
        ("user", "More"),
        ("assistant", "Arr"),
        ("user", "!"),
    ],
]


def ollama(template, messages):
    """What Go's text/template makes of the few actions that Ollama's templates have."""
    words = re.split(r"(\{\{.*?\}\})", template)
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")

    def run(at, values):
        """From word `at` to the else or end that closes it; returns where that is, and the text."""
        out = ""
        while at < len(words):
            action = words[at].strip("{} ") if words[at].startswith("{{") else None
            if action is None:
                out += words[at]
            elif action in (".System", ".Content"):
                out += values[action]
            elif action.startswith("if "):
                at, made = branches(at, values)
                out += made
            elif action == "range .Messages":
                made = [run(at + 1, {**values, ".Content": m["content"], ".Role": m["role"]}) for m in messages]
                at, out = made[0][0], out + "".join(text for _, text in made)
            else:
                assert action == "end" or action.startswith("else"), action
                return at, out
            at += 1
        return at, out

    def branches(at, values):
        done, out = False, ""
        while True:
            condition = words[at].strip("{} ").removeprefix("else").strip().removeprefix("if").strip()
            wanted = re.fullmatch(r'eq \.Role "(\w+)"', condition)
            holds = not condition or (values[".Role"] == wanted[1] if wanted else bool(values[condition]))
            at, made = run(at + 1, values)
            if holds and not done:
                done, out = True, made
            if words[at] == "{{ end }}":
                return at, out

    return run(0, {".System": system, ".Content": "", ".Role": ""})[1]


def said(talk):
    return [{"role": role, "content": content} for role, content in talk]


def exported(folder, template, notes=None, **changes):
    """The Modelfile, README and tokenizer of a small model with this chat template; `notes` gets what export says."""
    tokenizer = byte_level()
    tokenizer.chat_template = template
    model = LlamaForCausalLM(config(len(tokenizer), num_hidden_layers=1, **changes))
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=[1, 7])
    model.half().save_pretrained(folder / "m")
    tokenizer.save_pretrained(folder / "m")
    assert main(["quantize", str(folder / "m"), "-o", str(folder / "p"), "--method", "absmean"]) == 0
    export(folder / "p", folder / "g", ExportRequest("gguf"), note=([] if notes is None else notes).append)
    return (folder / "g" / "Modelfile").read_text(), (folder / "g" / "README.md").read_text(), tokenizer


def instructions(modelfile):
    """(word, value) of each instruction of a Modelfile."""
    line = re.compile(r'^(FROM|ADAPTER|TEMPLATE|PARAMETER \w+) (?:"""(.*?)"""|"(.*?)"|(.*?))$\n', re.S | re.M)
    assert not line.sub("", modelfile), "there is something else in it"
    return [(word, a or b or c) for word, a, b, c in line.findall(modelfile)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_modelfile_says_what_the_model_says(name, tmp_path):
    modelfile, readme, tokenizer = exported(tmp_path, TEMPLATES[name], max_position_embeddings=8192)
    path, _ = gguf_in(tmp_path / "g")
    template = dict(instructions(modelfile))["TEMPLATE"]
    assert instructions(modelfile) == [
        ("FROM", f"./{path.name}"),
        ("TEMPLATE", template),
        ("PARAMETER num_ctx", "4096"),
        ("PARAMETER stop", tokenizer.eos_token),
        ("PARAMETER stop", tokenizer.convert_ids_to_tokens(7)),
    ]
    for talk in TALKS:
        if name == "inst" and talk[0][0] == "system":
            continue  # which this template refuses
        want = tokenizer.apply_chat_template(said(talk), tokenize=False, add_generation_prompt=True)
        assert ollama(template, said(talk)) == want
    assert ("without system messages, which it refuses" in readme) == (name == "inst")
    assert "context has 8192 tokens. The Modelfile asks for 4096" in readme


def test_notes_for_lm_studio_llama_cpp_and_ollama(tmp_path):
    _, readme, _ = exported(tmp_path, CHATML)
    path, _ = gguf_in(tmp_path / "g")
    assert f"lms import {path.name}" in readme.replace("FILE.gguf", path.name)
    for line in (f"llama-server -m {path.name}", f"llama-cli -m {path.name} -p", "ollama create NAME -f Modelfile"):
        assert line in readme
    assert "LM Studio, and llama.cpp with --jinja, run it" in readme
    assert "--lora" not in readme and "It loads no adapter" not in readme
    assert "num_ctx there" not in readme  # its 256 tokens are all asked for


@pytest.mark.parametrize(
    ("kinds", "stored", "is_new"),
    [
        (("Q1_0",), "stored as Q1_0: 1.500 bits a weight", True),
        (("TQ2_0",), "stored as TQ2_0: 1.500 bits a weight", False),
        (("Q8_0",), "stored as Q8_0, dense: 1.500 bits a weight", False),
        (("F16",), "stored as F16, dense: 1.500 bits a weight", False),
        (("F16", "Q1_0"), "stored as F16 and Q1_0: 1.500 bits a weight", True),
    ],
    ids=str,
)
def test_bits_and_age_are_those_of_the_types_in_the_file(kinds, stored, is_new):
    said = readme(Written("m.gguf", None, kinds, 1.5, 2.5, "llama", 256, False, None, ()), {}, {})
    assert stored in said and "The whole has 2.500 bits a parameter" in said
    assert ("Q1_0 needs a llama.cpp that knows it" in said) == is_new
    assert ("its runtime must be as new" in said) == is_new
    assert ("Any llama.cpp of the last years reads it" in said) != is_new


def test_a_context_that_is_smaller_than_ollamas(tmp_path):
    modelfile, _, _ = exported(tmp_path, None)
    assert instructions(modelfile)[1] == ("PARAMETER num_ctx", "256")
    assert "TEMPLATE" not in modelfile


@pytest.mark.parametrize("template", [COUNTING, LONGER])
def test_a_template_that_is_more_than_texts_around_messages(template, tmp_path):
    notes = []
    modelfile, readme, _ = exported(tmp_path, template, notes)
    assert "TEMPLATE" not in modelfile
    assert "write a TEMPLATE into the Modelfile" in readme
    assert any("the Modelfile has no TEMPLATE" in line for line in notes)


def test_a_beginning_that_llama_cpp_adds_is_not_there_twice():
    tokenizer = byte_level()
    tokenizer.chat_template = HEADERS
    assert turns(tokenizer, add_bos=False).start == "<s>"
    assert turns(tokenizer, add_bos=True).start == ""
    assert "<s>" not in turns(tokenizer, add_bos=True).go()


def test_smollm2s_own_template():
    if not (cache() / NAME).is_dir():
        pytest.skip("SmolLM2 is not there: make demo makes it")
    tokenizer = AutoTokenizer.from_pretrained(cache() / NAME)
    for talk in TALKS:
        want = tokenizer.apply_chat_template(said(talk), tokenize=False, add_generation_prompt=True)
        assert ollama(turns(tokenizer, add_bos=False).go(), said(talk)) == want
