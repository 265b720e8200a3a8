"""From a foreign checkpoint to a packed directory: `signbit import`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoTokenizer, GenerationConfig

from signbit import format as packed_format
from signbit.errors import FormatError, OptionError
from signbit.hub.config import SignbitConfig
from signbit.hub.load import DTYPES, load_tokenizer
from signbit.hub.quantizer import attach_, describe
from signbit.hub.save import save
from signbit.interop.checkpoint import Checkpoint, Layer
from signbit.interop.form import empty_model
from signbit.interop.recognise import open_checkpoint
from signbit.linear import PackedLinear
from signbit.methods.base import store
from signbit.models import Decision, Report, find_structure, linear_parts, set_module
from signbit.version import VERSION
from signbit.weight import BinaryWeight

AGAIN = "copy or download the checkpoint again"


def convert(
    source: str,
    out: str | Path,
    masks: str | Path | None = None,
    tokenizer: str | None = None,
    dtype: str = "auto",
    overwrite: bool = False,
    command: str | None = None,
    progress: Callable[[str, int, int, str], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> tuple[Path, Report]:
    """Writes the foreign checkpoint `source` as the packed directory `out`: the same signs, scales and logits.

    One layer is read at a time, the first once OUT and the tokenizer are known to be good. `tokenizer` is a directory to
    take the tokenizer from, `masks` PB-LLM's mask files, `dtype` what everything but signs is stored in ("auto": as it
    was). `progress` is called with (stage, done, in all, name), `note` with lines for the user. Raises FormatError for what
    is damaged, incomplete or none of the forms that signbit reads, with the name of the tensor; OptionError for options
    that do not fit, WeightError if `dtype` cannot hold a scale.
    """
    note = note or (lambda _line: None)
    if dtype not in DTYPES:
        raise OptionError(f"--dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    target = packed_format.check_target(out, overwrite)
    if target.resolve() in (Path(source).resolve(), *Path(source).resolve().parents):
        raise OptionError(f"OUT is the source {source} itself, or holds it; give another directory")
    checkpoint = open_checkpoint(source, masks)
    for line in checkpoint.notes:
        note(line)
    model = empty_model(checkpoint.config, source)
    structure = find_structure(model)
    _check_complete(checkpoint, [target.name for target in structure.targets])
    _generation_(model, Path(source))
    made = _tokenizer(checkpoint, tokenizer, out, note)
    decisions, zeros = [], 0
    for done, (name, read) in enumerate(checkpoint.layers.items()):
        layer = read()
        packed = _fitting(model, name, _cast(layer, dtype))
        set_module(model, name, packed)
        weights = packed.out_features * packed.in_features
        bias = 0 if packed.bias is None else packed.bias.numel()
        decisions.append(
            Decision(name, "binarized", f"as in {checkpoint.form}", weights + bias, packed.nbytes, weights)
        )
        zeros += layer.zeros
        if progress is not None:
            progress("importing", done + 1, len(checkpoint.layers), name)
    dense = [d for d in structure.kept if d.name not in checkpoint.layers]
    dense += [
        Decision(t.name, "kept", "dense in the checkpoint", t.out_features * t.in_features)
        for t in structure.targets
        if t.name not in checkpoint.layers
    ]
    _fill_(model, checkpoint, dtype)
    if zeros:
        note(f"{zeros:,} stored weights are exactly 0: {checkpoint.zero}")
    report = Report((*decisions, *dense), structure.block_parameters)
    settings = {"method": "import", "options": {"form": checkpoint.form, "zeros": zeros}, "signbit_version": VERSION}
    attach_(model, SignbitConfig.from_dict(describe(model, settings).to_dict()), report)
    return save(model.eval(), out, made, report, source, command, overwrite), report


def _check_complete(checkpoint: Checkpoint, targets: list[str]) -> None:
    """Raises FormatError for a linear of the blocks that should be binarized and is not: its tensors are missing."""
    for name in targets:
        if name not in checkpoint.layers and not checkpoint.may_be_dense(name):
            raise FormatError(
                f"{name} is not binarized as in {checkpoint.form}, where each linear layer of the blocks is: its tensors are "
                f"missing; {AGAIN}"
            )


def _fitting(model: nn.Module, name: str, packed: PackedLinear) -> PackedLinear:
    """`packed` itself; raises FormatError unless `model` has a linear layer of its size at `name`."""
    if f"{name}.weight" in (getattr(model, "all_tied_weights_keys", None) or {}):
        raise FormatError(
            f"{name} is binarized in the checkpoint, and tied to the embedding by config.json (tie_word_embeddings); set that "
            "to false"
        )
    try:
        weight, bias = linear_parts(model.get_submodule(name))
    except AttributeError:
        raise FormatError(
            f"{type(model).__name__}, which config.json describes, has no linear layer {name}; {AGAIN}"
        ) from None
    shape = (packed.out_features, packed.in_features)
    if tuple(weight.shape) != shape or (bias is not None) != (packed.bias is not None):
        words = {True: "with a bias", False: "without one"}
        raise FormatError(
            f"{name} is {list(shape)} {words[packed.bias is not None]} in the checkpoint, {list(weight.shape)} "
            f"{words[bias is not None]} by config.json; {AGAIN}"
        )
    return packed


def _cast(layer: Layer, dtype: str) -> PackedLinear:
    """The packed layer with all of its floats in `dtype` ("auto": as they are)."""
    packed = layer.packed
    if dtype == "auto":
        return packed
    spec = packed.spec
    bias = None if packed.bias is None else packed.bias.to(getattr(torch, dtype))
    weights = [_cast_weight(weight, dtype) for weight in packed.weights]
    return PackedLinear(
        weights, bias, spec.norm_in, spec.norm_in_eps, spec.act_bits, spec.norm_out, spec.norm_out_eps
    )  # fmt: skip


def _cast_weight(w: BinaryWeight, dtype: str) -> BinaryWeight:
    floats = {name: getattr(w, name) for name in ("scale", "shift", "in_scale", "in_shift")}
    cast: dict[str, Any] = {n: store(t, dtype, shift="shift" in n) for n, t in floats.items() if t is not None}
    salient = None if w.salient is None else replace(w.salient, scale=store(w.salient.scale, dtype))
    return replace(w, **cast, salient=salient)


def _fill_(model: Any, checkpoint: Checkpoint, dtype: str) -> None:
    """Gives `model` everything but its packed layers; raises FormatError, by name, for a tensor missing or too many."""
    model.tie_weights()
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    own = tuple(f"{name}." for name in checkpoint.layers)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items() if not name.startswith(own)}
    if unknown := sorted(set(checkpoint.rest) - set(wanted)):
        raise FormatError(
            f"the tensor {unknown[0]} is not one of a {type(model).__name__} in the form of {checkpoint.form}; nothing was "
            "imported, because what it does would be lost"
        )
    if missing := sorted(set(wanted) - set(checkpoint.rest) - tied):
        raise FormatError(f"the tensor {missing[0]} is missing; {AGAIN}")
    state = {name: checkpoint.rest[name] for name in checkpoint.rest}
    floats = [tensor.dtype for tensor in state.values() if tensor.is_floating_point()]
    common = _widest(floats) if dtype == "auto" else getattr(torch, dtype)
    for name, tensor in state.items():
        if tensor.shape != wanted[name]:
            raise FormatError(
                f"the tensor {name} is {list(tensor.shape)}, {list(wanted[name])} by config.json; {AGAIN}"
            )
        state[name] = tensor.to(common) if tensor.is_floating_point() else tensor
    for name, source in dict(getattr(model, "all_tied_weights_keys", None) or {}).items():
        if name in state and not torch.equal(state.pop(name), state[source]):
            raise FormatError(
                f"the tensors {name} and {source} differ, but config.json ties them (tie_word_embeddings); set that to false"
            )
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()


def _widest(dtypes: list[torch.dtype]) -> torch.dtype:
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    return widest


def _generation_(model: Any, source: Path) -> None:
    """Takes over how the original generates, where a file says it."""
    if (source / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(source)
        except (OSError, ValueError, TypeError) as error:
            raise FormatError(f"{source / 'generation_config.json'} is damaged ({error}); {AGAIN}") from error


def _tokenizer(checkpoint: Checkpoint, given: str | None, out: str | Path, note: Callable[[str], None]) -> Any:
    if given is not None:
        return _within(load_tokenizer(given), checkpoint.config.vocab_size, f"--tokenizer {given}")
    try:
        made = AutoTokenizer.from_pretrained(**checkpoint.tokenizer, config=checkpoint.config)
    except Exception as error:  # transformers, tokenizers and sentencepiece each raise their own
        first = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        why = (
            "" if first.rstrip().endswith(":") else f" ({first})"
        )  # transformers' list of reasons begins on the next line
        note(f"no tokenizer was found beside it{why}; {out} has none: repeat with --tokenizer DIR to give it one")
        return None
    if "gguf_file" in checkpoint.tokenizer:
        _drop_beyond_(made, checkpoint.config.vocab_size)
    return _within(made, checkpoint.config.vocab_size, "the tokenizer beside it")


def _within(tokenizer: Any, rows: int, which: str) -> Any:
    """`tokenizer` itself; raises FormatError if it has a token that is no row of the embedding."""
    token, highest = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1], default=("", -1))
    if highest >= rows:
        raise FormatError(
            f"{which} is not this model's: its token {token!r} has the id {highest}, and the embedding has {rows} rows "
            f"(ids 0 to {rows - 1}); give the model's own with --tokenizer DIR"
        )
    return tokenizer


def _drop_beyond_(tokenizer: Any, rows: int) -> None:
    """Takes added tokens without a row of the embedding out: transformers' GGUF reader adds GPT-2's <|endoftext|>."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = [token for token in described["added_tokens"] if token["id"] < rows]
    if len(kept) < len(described["added_tokens"]):
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps({**described, "added_tokens": kept}))
