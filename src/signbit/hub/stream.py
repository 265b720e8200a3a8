"""Quantizing a model on the disk into a packed directory, with one block of it in memory at a time."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import shutil
from collections import ChainMap
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from signbit import format as packed_format
from signbit import ptq
from signbit.data import CalibrationOptions, check_calibration, draw_windows, self_generated
from signbit.data.calibration import SELF, check_length
from signbit.errors import OptionError, SignbitError
from signbit.hub.config import SignbitConfig
from signbit.hub.load import load_any, load_source, load_streamed, load_tokenizer, torch_device
from signbit.hub.quantizer import finish_
from signbit.hub.save import save
from signbit.linear import LayerSpec, PackedLinear
from signbit.models import Decision, Report, Structure, linear_parts, set_module, split_experts_
from signbit.version import VERSION
from signbit.weight import BinaryWeight

_FINISHED = "finished"
#: Called with a line for the user.
Note = Callable[[str], None]


def source_digests(model: str) -> dict[str, str]:
    """What tells whether a source changed: the commit of a hub model, the SHA-256 of each file of a directory."""
    folder = Path(model)
    if not folder.is_dir():
        from transformers import AutoConfig

        return {"commit": str(getattr(AutoConfig.from_pretrained(model), "_commit_hash", None)), "id": model}
    digests = {}
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".safetensors", ".bin", ".model", ".txt") and file.is_file():
            with file.open("rb") as stream:
                digest = hashlib.sha256()
                while piece := stream.read(1 << 22):
                    digest.update(piece)
            digests[file.name] = digest.hexdigest()
    return digests


class StreamedBlocks(ptq.Blocks):
    """Blocks that are read from the source when their turn comes, and written to `parts` when they are done."""

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        structure: Structure,
        plan: ptq.Plan,
        device: str,
        parts: packed_format.Parts,
    ) -> None:
        super().__init__(model, structure, plan, device)
        self.weights, self.parts = weights, parts

    @staticmethod
    def part(index: int) -> str:
        """The name of a block's part."""
        return f"block-{index:05}"

    def load(self, index: int) -> None:
        prefix = f"{self.structure.blocks}.{index}"
        block = self.modules[index]
        for name, parameter in list(block.named_parameters()):
            if parameter.is_meta:
                tensor = self.weights[f"{prefix}.{name}"].to(self.device)
                ptq.check_finite(f"{prefix}.{name}", tensor)
                owner, _, last = name.rpartition(".")
                setattr(block.get_submodule(owner), last, nn.Parameter(tensor, requires_grad=False))
        block.to(self.device)
        split_experts_(block, self.plan.selection, prefix, index)

    def finished(self, index: int) -> tuple[list[Decision], dict[str, BinaryWeight | Tensor]] | None:
        record = self.parts.record(self.part(index))
        if record is None:
            return None
        decisions = [Decision(**values) for values in record["decisions"]]
        tensors = self.parts.tensors(self.part(index))
        results: dict[str, BinaryWeight | Tensor] = {}
        for decision in decisions:
            own = {
                k.removeprefix(f"{decision.name}."): v for k, v in tensors.items() if k.startswith(f"{decision.name}.")
            }
            if decision.name in record["layers"]:
                spec = LayerSpec.from_dict(record["layers"][decision.name])
                results[decision.name] = _fill(spec, own).weights[0]
            else:
                results[decision.name] = own["weight"]  # as stored: a Conv1D's is [K, N]
        return decisions, results

    def skip(self, index: int) -> None:
        record = self.parts.record(self.part(index))
        headers = self.parts.stored([self.part(index)]).headers
        prefix = f"{self.structure.blocks}.{index}"
        split_experts_(self.modules[index], self.plan.selection, prefix, index)
        for name, values in record["layers"].items():
            spec = LayerSpec.from_dict(values)
            lengths = {k.removeprefix(f"{name}."): h.shape[0] for k, h in headers.items() if k.startswith(f"{name}.")}
            bias = linear_parts(self.model.get_submodule(name))[1]
            dtype = torch.float32 if bias is None else bias.dtype
            set_module(self.model, name, PackedLinear.from_spec(spec, lengths, dtype, "meta"))

    def leave(self, index: int, decisions: list[Decision]) -> None:
        block = self.modules[index]
        prefix = f"{self.structure.blocks}.{index}"
        if self.parts.record(self.part(index)) is None:
            tensors = {f"{prefix}.{name}": tensor for name, tensor in block.state_dict().items()}
            layers = {
                f"{prefix}.{name}": module.spec.to_dict()
                for name, module in block.named_modules()
                if isinstance(module, PackedLinear)
            }
            record = {"decisions": [asdict(decision) for decision in decisions], "layers": layers}
            self.parts.put(self.part(index), tensors, record)
        block.to("meta")
        release_memory()


def release_memory() -> None:
    """Gives back what a block took: cycles that hold its file open, and the heap that it left in pieces."""
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def _fill(spec: LayerSpec, tensors: dict[str, Tensor]) -> PackedLinear:
    """The packed layer of stored tensors."""
    lengths = {name: tensor.shape[0] for name, tensor in tensors.items() if tensor.ndim}
    layer = PackedLinear.from_spec(spec, lengths, torch.float32, "meta")
    layer.load_state_dict(tensors, assign=True)
    return layer


def quantize(
    source: str,
    out: str | Path,
    config: SignbitConfig,
    calibration: CalibrationOptions | None = None,
    data_dir: str | Path | None = None,
    device: str = "cpu",
    inputs_on: ptq.Where = "cpu",
    overwrite: bool = False,
    restart: bool = False,
    command: str | None = None,
    progress: Callable[[str, int, int, str], None] | None = None,
    note: Note | None = None,
) -> tuple[Path, Report]:
    """Quantizes the model directory (or hub id) `source` into the packed directory `out`, one block at a time.

    What is finished stands in OUT.partial until the end; after a kill, the same call goes on at the last finished
    block and ends with the same bytes. `calibration` is needed by methods that measure inputs, `device` is where
    blocks compute, `inputs_on` where the inputs of a block are kept. `progress` is called with (stage, done, in all,
    name). Raises SignbitError's children for whatever a user can mend; `out` is then as it was.
    """
    note = note or (lambda _line: None)
    chosen = calibration or CalibrationOptions()
    folder = Path(out).absolute().with_name(f"{Path(out).absolute().name}.partial")
    overwrite = overwrite or _is_finished(Path(out), folder)
    target = packed_format.check_target(out, overwrite)
    _check_apart(source, target, folder)
    torch_device(device)
    skeleton = load_source(source, skeleton=True)
    split_experts_(skeleton, config.plan.selection)
    structure = ptq.find_targets(skeleton, config.plan)
    needs = config.plan.needs(target.name for target in structure.targets)
    if needs.moments:
        if chosen.calibration is None:
            raise OptionError(
                f"{config.method} measures the layers' inputs: give --calibration c4|wikitext2|ptb|FILE|self "
                "(or options that need none: for pbllm --no-gptq --saliency magnitude)"
            )
        if packed_format.Parts(folder).record("calibration") is None:
            check_calibration(chosen, data_dir)
    elif chosen.calibration is not None:
        raise OptionError(
            f"--calibration {chosen.calibration} would not be used: {config.method} with these options measures no "
            "inputs; leave it out"
        )
    if config.head == "int8":
        ptq.plan_head(skeleton)
    tokenizer = None
    try:
        tokenizer = load_tokenizer(source)
    except SignbitError as error:
        if needs.moments and chosen.calibration != SELF:
            raise
        note(f"{error}; {out} will have no tokenizer")
    settings = {
        "source": source_digests(source),
        "config": config.settings(),
        "calibration": asdict(chosen) if needs.moments else None,
        "device": torch.device(device).type,
        "signbit": VERSION,
    }
    with ExitStack() as stack:
        parts = stack.enter_context(packed_format.Parts.opened(folder, settings, restart))
        if done := sum(parts.record(StreamedBlocks.part(i)) is not None for i in range(structure.block_count)):
            note(f"going on in {folder}: {done} of {structure.block_count} blocks are finished")
        windows = kept = None
        if needs.moments:
            windows, origin = _windows(
                source, parts, tokenizer, chosen, data_dir, device, skeleton.config, progress, note
            )
            kept = {**asdict(chosen), "text": origin}
        for stale in folder.glob("offload-*"):
            shutil.rmtree(stale, ignore_errors=True)
        offload = stack.enter_context(TemporaryDirectory(dir=folder, prefix="offload-"))
        model, weights = load_streamed(source, structure.blocks, offload, device)
        for name, tensor in _outside(model, structure.blocks).items():
            ptq.check_finite(name, tensor)
        blocks = StreamedBlocks(model, weights, structure, config.plan, device, parts)

        def layers(done: int, total: int, name: str) -> None:
            if progress is not None:
                progress("quantizing", done, total, name)

        decisions = ptq.Walk(blocks, windows, layers, inputs_on, folder).run()
        report = Report((*decisions, *structure.kept), structure.block_parameters)
        if config.head == "int8":
            report = ptq.with_head(report, ptq.quantize_head_(model))
        finish_(model, config, report, kept)
        tensors = ChainMap(
            _outside(model, structure.blocks),
            parts.stored([blocks.part(i) for i in range(structure.block_count)]),  # type: ignore[arg-type]
        )
        parts.put(_FINISHED, {}, packed_format.tensors_sha256(tensors))
        path = save(model, target, tokenizer, report, source, command, overwrite, tensors)
        parts.remove()
    return path, report


def _is_finished(out: Path, folder: Path) -> bool:
    """Whether `out` is what the run in `folder` made, killed between its last rename and its tidying up."""
    digest = packed_format.Parts(folder).record(_FINISHED)
    try:
        return digest is not None and packed_format.read_description(out)[1].tensors_sha256 == digest
    except SignbitError:
        return False


def _check_apart(source: str, target: Path, folder: Path) -> None:
    """Raises OptionError if the source stands where OUT or OUT.partial is to be."""
    resolved = Path(source).resolve()
    if any(own.resolve() in (resolved, *resolved.parents) for own in (target, folder)):
        raise OptionError(
            f"OUT (or OUT.partial) is the source model {source} itself, or holds it; give another directory"
        )


def _outside(model: nn.Module, blocks: str) -> dict[str, Tensor]:
    """The tensors outside of the blocks, tied ones once."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(f"{blocks}.")}
    kept: dict[str, Tensor] = remove_tied_weights_from_state_dict(state, model)
    return kept


def _windows(
    source: str,
    parts: packed_format.Parts,
    tokenizer: Any,
    chosen: CalibrationOptions,
    data_dir: str | Path | None,
    device: str,
    config: Any,
    progress: Callable[[str, int, int, str], None] | None,
    note: Note,
) -> tuple[Tensor, str]:
    """Calibration windows and where they are from; kept with the parts, so that a resumed run has the same."""
    record = parts.record("calibration")
    if record is None:
        limit = getattr(config, "max_position_embeddings", None)
        check_length(chosen, limit)
        if chosen.calibration == SELF:

            def written(done: int, total: int) -> None:
                if progress is not None:
                    progress("writing its own text", done, total, "")

            model = load_any(source, "auto", device)
            windows, origin = self_generated(model, chosen, progress=written), "written by the model itself"
        else:
            windows, origin = draw_windows(tokenizer, chosen, data_dir, limit)
        parts.put("calibration", {"windows": windows}, origin)
        return windows, origin
    note(f"the calibration windows are those that were drawn before, from {record}")
    return parts.tensors("calibration")["windows"], record
