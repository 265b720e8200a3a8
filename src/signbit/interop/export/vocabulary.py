"""A Hugging Face tokenizer as llama.cpp has it: pieces, merges or scores, special tokens, chat template."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from signbit.errors import ExportError

_CASED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
#: The expressions that split text before the pieces are merged, by llama.cpp's names for them.
_SPLITS = {_CASED + r"\p{N}{1,3}" + _TAIL: "llama-bpe", _CASED + r"\p{N}" + _TAIL: "qwen2"}
#: What merges would make is not looked up first: llama.cpp has other names for the same expression.
_MERGED_ALWAYS = {"llama-bpe": "dbrx"}
_OTHERWISE = "--format dense, then llama.cpp's own convert_hf_to_gguf.py, may know it"
#: gguf.TokenType
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True)
class Vocabulary:
    """What stands in the metadata of a GGUF file of a tokenizer; `kind` and `split` are llama.cpp's names."""

    kind: str
    split: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    special: dict[str, int] = field(default_factory=dict)
    add_bos: bool = False
    add_eos: bool = False
    add_space: bool = False
    chat_template: str | None = None

    def write(self, writer: Any) -> None:
        """Into the metadata of a gguf.GGUFWriter."""
        writer.add_tokenizer_model(self.kind)
        writer.add_tokenizer_pre(self.split)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
        if self.merges:
            writer.add_token_merges(self.merges)
        for name, token in self.special.items():
            getattr(writer, f"add_{name}_token_id")(token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.kind == "llama":
            writer.add_add_space_prefix(self.add_space)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def vocabulary(tokenizer: Any, rows: int) -> Vocabulary:
    """The vocabulary of a fast tokenizer for an embedding of `rows` rows.

    Byte-level BPE and SentencePiece's BPE with bytes are read; raises ExportError, with the reason, for anything else.
    """
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is None:
        raise ExportError(f"the tokenizer is a {type(tokenizer).__name__} without a tokenizer.json; {_OTHERWISE}")
    described = json.loads(inner.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise ExportError(
            f"the tokenizer is {model['type']}; llama.cpp runs byte-level BPE and SentencePiece's BPE; {_OTHERWISE}"
        )
    steps = _steps(described["pre_tokenizer"], "pretokenizers")
    byte_level = any(step["type"] == "ByteLevel" for step in steps)
    if not byte_level and not model.get("byte_fallback"):
        raise ExportError(f"the tokenizer's BPE knows no bytes, which llama.cpp's needs; {_OTHERWISE}")
    tokens, types = _tokens(described, rows, _NORMAL)
    pairs = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    ids = {**model["vocab"], **{token["content"]: token["id"] for token in described["added_tokens"]}}
    special = {
        short: ids[token]
        for short, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unk"), ("pad", "pad"))
        if (token := getattr(tokenizer, f"{name}_token", None)) in ids
    }
    encoded = tokenizer("a")["input_ids"]
    about: dict[str, Any] = {
        "special": special,
        "add_bos": "bos" in special and encoded[:1] == [special["bos"]],
        "add_eos": "eos" in special and len(encoded) > 1 and encoded[-1] == special["eos"],
        "chat_template": _template(tokenizer),
    }
    if byte_level:
        merges = [" ".join(part.replace(" ", "\u0120") for part in pair) for pair in pairs]
        return Vocabulary("gpt2", _split(described, steps), tokens, types, merges=merges, **about)
    add_space = _adds_space(described, steps)
    for token, i in ids.items():
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[i] = _BYTE
    if "unk" in special:
        types[special["unk"]] = _UNKNOWN
    return Vocabulary("llama", "default", tokens, types, scores=_scores(tokens, pairs), add_space=add_space, **about)


def _steps(part: Any, key: str) -> list[Any]:
    """The steps of a normalizer or pre-tokenizer, alone or in a row."""
    if part is None:
        return []
    return list(part[key]) if part["type"] == "Sequence" else [part]


def _tokens(described: Any, rows: int, kind: int) -> tuple[list[str], list[int]]:
    """Tokens and their types, one a row of the embedding; rows without a token are unused."""
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [_UNUSED] * rows
    added = {token["id"]: token for token in described["added_tokens"]}
    ids = {
        **{i: token for token, i in described["model"]["vocab"].items()},
        **{i: t["content"] for i, t in added.items()},
    }
    if ids and max(ids) >= rows:
        raise ExportError(
            f"the tokenizer has a token {max(ids)} and the embedding {rows} rows; give the model the tokenizer that is its own"
        )
    for i, token in ids.items():
        tokens[i] = token
        types[i] = kind if i not in added else _CONTROL if added[i]["special"] else _USER
    return tokens, types


def _split(described: Any, steps: list[Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer splits text."""
    strange = [step["type"] for step in _steps(described["normalizer"], "normalizers") if step["type"] != "NFC"]
    last = steps[-1]
    before = [step["type"] for step in steps[:-1]]
    if not strange and last["type"] == "ByteLevel" and not last["add_prefix_space"]:
        if last["use_regex"] and not before:
            return "gpt-2"
        if last["use_regex"] and before == ["Digits"] and steps[0]["individual_digits"]:
            return "smollm"
        if not last["use_regex"] and before == ["Split"] and _plain(steps[0]):
            name = _SPLITS.get(steps[0]["pattern"].get("Regex"))
            if name is not None:
                return name if described["model"].get("ignore_merges") else _MERGED_ALWAYS.get(name, name)
    what = ", ".join([*strange, *(step["type"] for step in steps)])
    raise ExportError(
        f"the tokenizer splits text in a way ({what}) for which signbit has no name of llama.cpp's; {_OTHERWISE}"
    )


def _plain(split: Any) -> bool:
    return split["behavior"] == "Isolated" and not split["invert"]


def _adds_space(described: Any, steps: list[Any]) -> bool:
    """Whether a space is put before the text; raises ExportError if more is done to it than spaces made ▁."""
    normal = _steps(described["normalizer"], "normalizers")
    prepends = [step for step in normal if step["type"] == "Prepend" and step["prepend"] == "▁"]
    spaces = [s for s in normal if s["type"] == "Replace" and s["content"] == "▁" and s["pattern"] == {"String": " "}]
    meta = [step for step in steps if step["type"] == "Metaspace" and step["replacement"] == "▁" and not step["split"]]
    if len(prepends) + len(spaces) != len(normal) or len(meta) != len(steps) or not (spaces or meta):
        what = ", ".join(step["type"] for step in (*normal, *steps))
        raise ExportError(f"the tokenizer does more to text ({what}) than llama.cpp's SentencePiece does; {_OTHERWISE}")
    return bool(prepends) or any(step["prepend_scheme"] != "never" for step in meta)


def _scores(tokens: list[str], pairs: list[Any]) -> list[float]:
    """SentencePiece joins the pair with the highest score; BPE, the one that was learnt first."""
    first: dict[str, int] = {}
    for rank, pair in enumerate(pairs):
        first.setdefault("".join(pair), rank + 1)
    return [-float(first.get(token, 0)) for token in tokens]


def _template(tokenizer: Any) -> str | None:
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template
