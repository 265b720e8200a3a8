"""What the names in the documentation stand for when tests run it, and how its commands are made small."""

import copy
import gzip
import json
import lzma
import random
import shutil
from ctypes import CDLL
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import xllamacpp
from transformers.convert_slow_tokenizer import bytes_to_unicode

from signbit.cli import main
from signbit.train.recipe import read_recipe
from tests.conftest import tiny_llama_config
from tests.evaluate.test_tasks import ROWS, write_rows
from tests.interop import test_gguf
from tests.interop import test_import as foreign
from tests.interop.test_pbllm import saved as pbllm_saved

#: Flags that are left out, with how many words follow each: the length of a run is SMALLER's, and no GPU is here.
LEFT_OUT = {
    "--compile": 0, "--cuda-graph": 0, "--deterministic": 0, "--device": 1, "--teacher-device": 1, "--max-minutes": 1,
    "--max-passes": 1, "...": 0,
}  # fmt: skip

#: A template whose earlier turns are the same whatever follows, as training on conversations needs it.
_TEMPLATE = (
    "{% for m in messages %}{{ 'w50' if m['role'] == 'user' else 'w51' }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}w51 {% endif %}"
)
_STEPS = {"--max-steps": "2", "--sequence-length": "16", "--batch-size": "2", "--accumulation": "1", "--warmup-steps": "1",
          "--save-every": "1", "--log-every": "1", "--validation-blocks": "1"}  # fmt: skip
#: What recipes turn on and a tiny model on a CPU does not need → the flag that turns it off.
_OFF = {"compile": "--no-compile", "cuda_graph": "--no-cuda-graph"}

#: A recipe of two blocks.
_RECIPE = """about = "tiny"
method = "fbi"
vocabulary = 64
[shape]
hidden_size = 64
intermediate_size = 128
num_hidden_layers = 2
num_attention_heads = 4
[train]
max_steps = 2
sequence_length = 16
batch_size = 2
"""
_SHAPE = {"--hidden-size": "32", "--intermediate-size": "64", "--num-hidden-layers": "2", "--num-attention-heads": "4",
          "--max-position-embeddings": "2048"}  # fmt: skip


#: What is the one tiny model, as a directory of that name.
MODELS = (
    "MODEL", "TEACHER", "BIG", "huggyllama/llama-7b", "huggyllama/llama-13b", "meta-llama/Llama-2-7b-hf",
    "meta-llama/Llama-2-13b-hf", "TinyLlama/TinyLlama-1.1B-step-1431k-3T", "facebook/opt-350m", "facebook/opt-1.3b",
)  # fmt: skip
TOKENIZERS = ("TOKENIZER", "DIR", "beomi/llama-2-ko-7b")


@dataclass(frozen=True)
class Smaller:
    """Flags whose value a command gets, its own or not; `given` only where it has them already."""

    always: dict[str, str] = field(default_factory=dict)
    given: dict[str, str] = field(default_factory=dict)


#: What reports leave out and cut short: speed is measured in processes of their own.
_REPORT = {
    "--skip": "speed",
    "--max-windows": "1",
    "--held-out-tokens": "1024",
    "--sample-tokens": "3",
    "--data-dir": "DATA",
}

#: Verb → how its commands are made small.
SMALLER = {
    "quantize": Smaller(given={"--calibration": "DATA/c4/c4-train.part.jsonl"}),
    "distill": Smaller(_STEPS),
    "finetune": Smaller(_STEPS),
    "pretrain": Smaller(_STEPS),
    "data self-generate": Smaller({"--sequences": "4", "--sequence-length": "16", "--batch": "4"}),
    "data teacher-logits": Smaller({"--sequence-length": "16", "--batch": "2"}, {"--top": "8"}),
    "eval": Smaller(given={"--max-windows": "1", "--limit": "1", "--data-dir": "DATA"}),
    "report": Smaller(_REPORT),
    "compare": Smaller(_REPORT),
    "diff": Smaller({"--text-tokens": "1024"}),
    "generate": Smaller(given={"--max-new-tokens": "3"}),
    "memory": Smaller({"--measure": "never"}, {"--recipe": "tiny.toml"}),
}

#: Words → what stands for them: what has 57 parts, what is called otherwise here, checkpoints of two steps.
WORDS = {
    "mmlu": "mmlu_anatomy", "../shared/data": "DATA", "stories260K": "MODEL",
    "RUN/checkpoint-500": "LORA/checkpoint-2", "ADAPTED/checkpoint-500": "ADAPTED/checkpoint-2",
    "run/checkpoint-24": "LORA/checkpoint-2",
}  # fmt: skip

#: In Python: sets of the hub → files; a directory that exists already → a new one; MODEL in full precision.
PYTHON_WORDS = {
    'datasets.load_dataset("tatsu-lab/alpaca", split="train")': (
        'datasets.load_dataset("json", data_files="alpaca_rows.jsonl", split="train")'
    ),
    'signbit.save(model, "OUT")': 'signbit.save(model, "NEW")',
    "signbit.quantize_(model,": 'signbit.quantize_(AutoModelForCausalLM.from_pretrained("MODEL"),',
    '"RUN/checkpoint-500"': '"LORA/checkpoint-2"',
    '"text.jsonl")': '"text.jsonl", samples=2, sequence_length=16)',
}

#: Page → what its Python blocks take for granted.
PRELUDE = {
    "README.md": "from transformers import AutoTokenizer\ntokenizer = AutoTokenizer.from_pretrained('MODEL')\n",
}

#: What earlier commands of a page, or of another, leave.
MADE = (
    "signbit quantize MODEL -o OUT --method absmean --group 8",
    "signbit quantize MODEL -o TERNARY --method bitnet --weights ternary --norm none",
    "signbit quantize MODEL -o PTQ --method pbllm --salient 0.1 --calibration c4",
    "signbit distill MODEL -o RUN --data corpus.txt",
    "signbit data self-generate MODEL -o own.tokens",
    "signbit finetune OUT -o LORA --lora --data chat.jsonl",
)

#: Page → what stands for OUT there, before each block.
SETUP = {"docs/guides/llama-cpp.md": ["signbit", "import", "model.gguf", "-o", "OUT"]}

#: Pages that another test runs as a whole → that test.
PAGES_ELSEWHERE = {"docs/guides/server.md": "tests/serve/test_serving.py"}

#: Commands that other parts of CI run → the file that runs them, and by which words of its commands or its code.
ELSEWHERE = {
    "make demo": (".ci/run", "make demo"),
    "signbit serve OUT": ("tests/serve/test_serving.py", "serve"),
    "pip install .": (".ci/run", "pip install"),
    "pip install .[gguf]": ("Makefile", "-e '.[gguf]'"),
    "pip install signbit[lora]": ("Makefile", "lora"),
    "python -m benchmarks.load MODEL": (".ci/run", "-m benchmarks.load"),
}


def made_small(words: list[str]) -> list[str]:
    """A command of signbit as it is run here: `LEFT_OUT`, `WORDS` and `SMALLER` applied."""
    kept, at = [], 0
    while at < len(words):
        if words[at] in LEFT_OUT:
            at += 1 + LEFT_OUT[words[at]]
        else:
            kept.append(WORDS.get(words[at], words[at]))
            at += 1
    verb = " ".join(kept[1:3]) if kept[1] == "data" else kept[1]
    smaller = SMALLER.get(verb, Smaller())
    if "--list" in kept:
        return kept
    if "--lora" in kept and "RUN" in kept:
        kept[kept.index("RUN")] = "LORA"  # RUN stays a run of a binary model
    recipe = read_recipe(kept[kept.index("--recipe") + 1]) if "--recipe" in kept and verb != "memory" else {}
    kept += [flag for key, flag in _OFF.items() if recipe.get("train", {}).get(key)]
    flags = {**smaller.always, **{flag: value for flag, value in smaller.given.items() if flag in kept}}
    if verb == "pretrain" and "--model" not in kept:
        flags |= _SHAPE
    if verb in ("distill", "finetune", "pretrain"):
        if "--data" not in kept:
            flags |= {"--data": "corpus.txt"}  # a recipe's own comes from the hub
        if "-o" not in kept:
            flags |= {"-o": "RUN"}  # left out behind `...`
    if verb == "quantize" and "--calibration" in kept:
        flags |= {"--samples": "2", "--sequence-length": "16"}
    if verb == "eval" and ("--ppl" in kept or not {"--tasks", "--requests"} & set(kept)):
        flags |= {"--max-windows": "1"}
    if verb == "report" and "--tasks" in kept:
        flags |= {"--limit": "1"}
    if verb == "eval" and ("--tasks" in kept or ({"--table", "--model"} <= set(kept) and "--ppl" not in kept)):
        flags |= {"--limit": "1"}
    if verb in ("generate", "chat"):
        flags |= {"--max-new-tokens": "3"}
    if verb in ("quantize", "eval", "distill", "finetune", "pretrain") and (
        "--ppl" in kept or "--requests" not in kept
    ):
        flags |= {"--data-dir": "DATA"}
    return kept + [word for pair in flags.items() for word in pair]


def run(words: list[str]) -> None:
    """Runs a command of signbit made small, in this process; where it writes, nothing is in its way."""
    words = made_small(words)
    for flag in ("-o", "--out"):
        if flag in words and "--resume" not in words:
            shutil.rmtree(words[words.index(flag) + 1], ignore_errors=True)
    code = main(words[1:])
    assert code == 0, f"it ended with {code}: {' '.join(words)}"


def make(folder: Path, tokenizer) -> Path:
    """The directory in which blocks run: models, texts and checkpoints under the names that the documentation uses."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = _TEMPLATE
    folder.mkdir()
    model = LlamaForCausalLM(tiny_llama_config(hidden_size=64, intermediate_size=128, max_position_embeddings=2048))
    for name in MODELS:
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name in TOKENIZERS:
        tokenizer.save_pretrained(folder / name)
    (folder / "tiny.toml").write_text(_RECIPE)
    _texts(folder)
    _checkpoints(folder, tokenizer)
    _results(folder)
    return folder


def _texts(folder: Path) -> None:
    draw = random.Random(0)
    text = "\n\n".join(" ".join(f"w{draw.randrange(61)}" for _ in range(200)) for _ in range(14))
    rows = "".join(json.dumps({"text": part}) + "\n" for part in text.split("\n\n"))
    for name in ("wikitext2/wiki.test.raw", "wikitext2/wiki.train.raw", "ptb/ptb.test.txt", "ptb/ptb.train.txt"):
        (folder / "DATA" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "DATA" / name).write_text(text)
    (folder / "DATA/c4").mkdir()
    (folder / "DATA/c4/c4-validation.part.jsonl").write_text(
        json.dumps({"text": text}) + "\n"
    )  # a window has 2048 tokens
    for name in ("DATA/c4/c4-train.part.jsonl", "own.jsonl", "text.jsonl",
                 "korean.jsonl"):  # fmt: skip
        (folder / name).write_text(rows)
    for name in ("corpus.txt", "other.txt", "stories.txt", "own.txt"):
        (folder / name).write_text(text)
    for name in ("corpus.txt.xz", "novels.txt.xz", "books.txt.xz", "short.txt.xz"):
        with lzma.open(folder / name, "wt") as file:
            file.write(text)
    (folder / "amber").mkdir()
    with gzip.open(folder / "amber/train_000.jsonl.gz", "wt") as file:
        for part in text.split("\n\n"):
            file.write(json.dumps({"token_ids": [3 + len(word) for word in part.split()[:17]]}) + "\n")
    turns = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": " ".join(["w3"] * 6)}]
    (folder / "chat.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(40)))
    (folder / "alpaca.jsonl").write_text(
        "".join(json.dumps({"prompt": "w1 w2", "completion": " w3 w4"}) + "\n" for _ in range(40))
    )
    (folder / "alpaca_rows.jsonl").write_text(json.dumps({"text": "w1 w2 w3", "output": "w3"}) + "\n")
    for place, row, _, _ in ROWS.values():
        write_rows(folder / "DATA", place, [row] * 2)
    write_rows(folder / "DATA", "mmlu/anatomy/dev.jsonl", [ROWS["mmlu_anatomy"][1]] * 5)


def _checkpoints(folder: Path, tokenizer) -> None:
    forms = {
        "SRC": foreign.fbi, "FBI-LLM_130M": foreign.fbi, "FBI-LLM_1.3B": foreign.fbi, "FBI-LLM_7B": foreign.fbi,
        "ckpt-12": foreign.fbi, "onebit-packed": foreign.onebit_packed,
        "onebit-trained": foreign.onebit, "bitnet-transformers": foreign.beomi, "bitnet-b1.58": foreign.ternary,
    }  # fmt: skip
    for name, form in forms.items():
        form(folder / name, max_position_embeddings=2048)
        tokenizer.save_pretrained(folder / name)
    (folder / "ckpt-12/fabric_ckpt").mkdir()
    (folder / "ckpt-12/fabric_ckpt/__0_0.distcp").write_bytes(b"sharded")
    _, dense, masks = pbllm_saved(folder / "pbllm-saved")
    tokenizer.save_pretrained(dense)
    shutil.move(str(masks), folder / "gptq_pb/outputs/mask")
    tokens = ["<unk>", "<s>", "</s>", *bytes_to_unicode().values(), "ab", "<|endoftext|>"]
    ggml = CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
    test_gguf.write(folder / "model.gguf", ggml, test_gguf.Type.Q1_0, tokens=tokens, vocab_size=len(tokens))


def _results(folder: Path) -> None:
    """Runs MADE."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in MADE:
            run(command.split())
