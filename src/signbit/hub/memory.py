"""What a model takes in memory while it is trained and when it is packed, in several forms: computed, or measured here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from signbit import ptq
from signbit.errors import FormatError, OptionError, StructureError
from signbit.evaluate.energy import Products, linears_of
from signbit.hub.load import load_config
from signbit.methods import METHODS
from signbit.methods.base import find_method, make_options
from signbit.models import Shape, find_structure, linear_parts, set_module
from signbit.models.structure import find_blocks
from signbit.train import Trained, TrainOptions, binary_layers, pack_training_, start_dense_, start_training_
from signbit.train.outputs import one_sequence_a_row
from signbit.train.recipe import DENSE, read_recipe
from signbit.train.trainer import muon_beside_adam

Measure = Literal["auto", "always", "never"]
#: Of the work of a training step on a CPU (6 × parameters × tokens), how much is done to measure it without being asked.
_WORTH_MEASURING = 1e12


@dataclass(frozen=True)
class Use:
    """What one form of a model takes, in bytes."""

    phase: Literal["training", "packed"]
    form: str
    weights: int
    gradients: int
    optimizer: int
    activations: int
    """In training what the backward pass needs, the forms of the weights that it multiplies by included; the logits, which
    come in parts, are not. Packed: keys and values of attention."""
    measured: bool
    """Whether a step was made here and its tensors counted; else the same was done with shapes alone."""

    @property
    def total(self) -> int:
        """The sum of all."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Subject:
    """What is asked about: a shape, and how it is trained."""

    config: Any
    """transformers' configuration."""
    method: str
    method_options: Mapping[str, Any]
    options: TrainOptions
    trained: Trained
    sequences: int = 1
    """Sequences on a device at a time."""


def subject(
    recipe: str | None,
    model: str | None,
    vocabulary: int | None,
    method: str | None,
    sequences: int,
    length: int | None,
) -> Subject:
    """What a recipe trains, or what MODEL (a directory, a config.json or a hub id) would be; MODEL's shape goes before.

    Raises OptionError if neither says the shape, or nothing the vocabulary; FormatError for a model that is not to be had.
    """
    if recipe is None and model is None:
        raise OptionError("of what? give MODEL (a directory, a config.json, a hub id), or --recipe NAME")
    if sequences < 1 or (length is not None and length < 2) or (vocabulary is not None and vocabulary < 1):
        raise OptionError("--sequences and --vocabulary are at least 1, --sequence-length is at least 2")
    found = {} if recipe is None else read_recipe(recipe)
    name = method or found.get("method", "onebit")
    if name == DENSE:
        name = "onebit"
    options = found.get(name.replace("-", "_"), {})
    train = {key: value for key, value in found.get("train", {}).items() if key not in ("compile", "cuda_graph")}
    if length is not None:
        train["sequence_length"] = length
    model = model or found.get("model") or (None if "shape" in found else found.get("teacher"))
    if model is not None:
        config = _config_of(model)
        if vocabulary is not None:
            config.get_text_config().vocab_size = vocabulary
    else:
        size = vocabulary or found.get("vocabulary")
        if size is None:
            raise OptionError(f"the recipe {recipe} leaves the vocabulary to the tokenizer; give --vocabulary N")
        config = Shape(**found.get("shape", {})).config(size)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # what is packed already is looked at as what it was
    trained = Trained(**found.get("trained", {"train_embeddings": True}))
    return Subject(config, name, options, TrainOptions(**train), trained, sequences)


def _config_of(model: str) -> Any:
    if not Path(model).is_file():
        return load_config(model, packed=True)
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise FormatError(
            f"{model} is no config.json of a model ({str(error).splitlines()[0]}); give one, a directory or a hub id"
        ) from error


class _Signs(nn.Module):
    """A linear of signs that stay as they are, a byte each: what BitNet-Transformers kept of a matrix (int8 [N, K])."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("signs", torch.where(weight >= 0, 1, -1).to(torch.int8))
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        signs: Any = self.signs
        return F.linear(x, signs.to(x.dtype), self.bias)


def _as_signs_(model: nn.Module) -> None:
    for target in find_structure(model).targets:
        weight, bias = linear_parts(model.get_submodule(target.name))
        set_module(model, target.name, _Signs(weight.detach(), bias))


def _dense(subject: Subject, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_config(subject.config, dtype=dtype)


def _student(subject: Subject) -> Any:
    model = _dense(subject, torch.float32)
    start_training_(model, find_method(METHODS, subject.method), _plan(subject), subject.trained, blank=True)
    return model


def _blocks(subject: Subject) -> str:
    """The name of the list of blocks, which is not found by its linears where these are `_Signs`."""
    with torch.device("meta"):
        return find_blocks(_dense(subject, torch.bfloat16))[0]


def _plan(subject: Subject) -> ptq.Plan:
    return ptq.Plan(make_options(METHODS, subject.method, dict(subject.method_options)), allow_partial=True)


def _in_full(subject: Subject, dtype: torch.dtype) -> Any:
    model = _dense(subject, dtype)
    start_dense_(model, subject.trained)
    return model


def _with_signs(subject: Subject, dtype: torch.dtype) -> Any:
    model = _in_full(subject, dtype)
    _as_signs_(model)
    return model


#: Form → how its model is made, and whether it multiplies in bfloat16 though it is kept in float32.
_TRAINING: dict[str, tuple[Callable[[Subject], Any], bool]] = {
    "fp32": (lambda s: _in_full(s, torch.float32), False),
    "bf16": (lambda s: _in_full(s, torch.bfloat16), False),
    "int8 signs that stay, rest fp32": (lambda s: _with_signs(s, torch.float32), False),
    "1 bit, fp32 latents": (_student, True),
}
_PACKED: dict[str, Callable[[Subject], Any]] = {
    "fp32": lambda s: _dense(s, torch.float32),
    "bf16": lambda s: _dense(s, torch.bfloat16),
    "int8 signs, rest fp32": lambda s: _with_signs(s, torch.float32),
    "int8 signs, rest bf16": lambda s: _with_signs(s, torch.bfloat16),
}
ONE_BIT = "1 bit, rest bf16"


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, those that share their storage once."""
    sizes: dict[int, int] = {storage._cdata: storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}
    return sum(sizes.values())


def _weights(model: nn.Module) -> list[Tensor]:
    return list(model.state_dict(keep_vars=True).values())


class _Saved:
    """What autograd keeps of a forward pass for the backward one: of each block, and of the rest; parameters left out."""

    def __init__(self, model: nn.Module, blocks: Iterable[nn.Module]) -> None:
        self._own = {tensor.untyped_storage()._cdata for tensor in _weights(model)}
        self._sizes: dict[int, tuple[int, int]] = {}
        self._kept: list[Tensor] = []
        self._block, self.inputs = -1, 0
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(self._entering(number), with_kwargs=True)
            block.register_forward_hook(self._leave)

    def _entering(self, number: int) -> Callable[..., None]:
        def enter(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._block = number
            self.inputs += (given[0] if given else named["hidden_states"]).nbytes

        return enter

    def _leave(self, module: nn.Module, given: Any, output: Any) -> None:
        self._block = -1

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own and storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = self._block, storage.nbytes()
            self._kept.append(tensor)  # so that no other tensor gets its address
        return tensor

    def total(self, checkpointing: bool) -> int:
        """All of it; or the inputs of the blocks, one block's, and what is outside of blocks."""
        blocks: dict[int, int] = {}
        for block, size in self._sizes.values():
            blocks[block] = blocks.get(block, 0) + size
        if not checkpointing:
            return sum(blocks.values())
        outside = blocks.pop(-1, 0)
        return outside + self.inputs + max(blocks.values(), default=0)


def _optimizer(model: Any, options: TrainOptions) -> Any:
    name = options.optim
    if name == "muon" and any(isinstance(module, _Signs) for module in model.modules()):
        name = "adamw_torch"  # no matrix is left for Muon, and AdamW is beside it
    if name == "muon":
        return muon_beside_adam(model, options)
    cls, how = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(output_dir="unused", optim=name), model)
    return cls([parameter for parameter in model.parameters() if parameter.requires_grad], **how)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)


def _train(form: str, subject: Subject, device: str, measured: bool) -> Use:
    """One step of training, of tensors or of their shapes."""
    make, halves = _TRAINING[form]
    options = subject.options
    with torch.device(device):
        model = make(subject).train()
    ids = torch.zeros(subject.sequences, options.sequence_length, dtype=torch.long, device=device)
    saved = _Saved(model, model.get_submodule(_blocks(subject)).children())
    with (
        one_sequence_a_row(),
        torch.autocast(device.split(":")[0], torch.bfloat16, enabled=halves),
        torch.autograd.graph.saved_tensors_hooks(saved.keep, lambda tensor: tensor),
    ):
        output = model(input_ids=ids, use_cache=False, logits_to_keep=1)
    output.logits.float().sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = nbytes(p.grad for p in trained if p.grad is not None)
    optimizer = _optimizer(model, options)
    optimizer.step()
    kept = nbytes(_tensors(dict(enumerate(optimizer.state.values()))))
    activations = saved.total(options.gradient_checkpointing)
    return Use("training", form, nbytes(_weights(model)), gradients, kept, activations, measured)


def _keys_and_values(model: Any, subject: Subject, device: str) -> int:
    ids = torch.zeros(subject.sequences, subject.options.sequence_length, dtype=torch.long, device=device)
    with one_sequence_a_row(), torch.no_grad():
        cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    return nbytes(part for layer in cache.layers for part in (layer.keys, layer.values))


def _pack(form: str, subject: Subject, device: str, measured: bool) -> Use:
    with torch.device(device):
        model = _PACKED[form](subject).eval()
    return Use("packed", form, nbytes(_weights(model)), 0, 0, _keys_and_values(model, subject, device), measured)


def packed_bytes(subject: Subject) -> int:
    """Bytes of the model packed by the method, all that is no sign in 16 bits; one layer of each shape is packed for it."""
    method = find_method(METHODS, subject.method)
    plan = _plan(subject)
    with torch.device("meta"):
        model = _dense(subject, torch.bfloat16)
    start_training_(model, method, plan, subject.trained, blank=True)
    assert method.layer is not None
    sizes: dict[Any, int] = {}
    total = 0
    inside: set[str] = set()
    for name, layer in binary_layers(model):
        options = plan.options_of(name)
        key = (tuple(layer.weight.shape), layer.bias is not None, options)
        if key not in sizes:
            bias = None if layer.bias is None else torch.zeros(layer.weight.shape[0])
            probe = method.layer.blank(0.02 * torch.randn(layer.weight.shape), bias, options)
            sizes[key] = sum(
                t.numel() * (2 if t.is_floating_point() else t.element_size())
                for t in probe.pack().state_dict().values()
            )
        total += sizes[key]
        inside |= {f"{name}.{tensor}" for tensor in layer.state_dict()}
    rest: dict[int, int] = {
        id(t): t.nbytes for name, t in model.state_dict(keep_vars=True).items() if name not in inside
    }
    return total + sum(rest.values())


def _pack_one_bit(subject: Subject, device: str, measured: bool) -> Use:
    """The packed model: weights by `packed_bytes` or, where measured, of a model that is packed here."""
    if not measured:
        with _shapes_alone(subject.config.model_type):
            cache = _keys_and_values(_dense(subject, torch.bfloat16).eval(), subject, "cpu")
        return Use("packed", ONE_BIT, packed_bytes(subject), 0, 0, cache, False)
    model = _dense(subject, torch.float32)
    report = start_training_(model, find_method(METHODS, subject.method), _plan(subject), subject.trained, blank=True)
    for _, layer in binary_layers(model):
        for part in layer.parameters():
            nn.init.normal_(part, std=0.02)
    pack_training_(model, report, "bfloat16")
    model = model.to(device=device, dtype=torch.bfloat16).eval()
    return Use("packed", ONE_BIT, nbytes(_weights(model)), 0, 0, _keys_and_values(model, subject, device), True)


def free_bytes(device: str) -> int:
    """Memory that is free on a device now."""
    if device != "cpu":
        return int(torch.cuda.mem_get_info(device)[0])
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line)
    return 1024 * int(lines["MemAvailable"].split()[0])


@contextmanager
def _shapes_alone(what: str = "this model") -> Iterator[None]:
    """Tensors have shapes and no content inside; raises StructureError where a step cannot go on with that."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)  # what cannot go on is told below
    try:
        with FakeTensorMode():
            yield
    except RuntimeError as error:
        raise StructureError(
            f"what {what} computes depends on more than shapes (experts, images), so that its memory cannot be told "
            f"beforehand: {str(error).splitlines()[0]}. Give a plain decoder of its size (--recipe, or a config.json)"
        ) from error
    finally:
        log.setLevel(level)


def memory(
    subject: Subject, measure: Measure = "auto", device: str = "cpu", note: Callable[[str], None] = lambda line: None
) -> list[Use]:
    """What `subject` takes in training and packed, in each form.

    Computed first: the model is made and a step is made with tensors that have shapes and no content (FakeTensorMode, the
    meta device with a CPU's choice of kernels). Then, where `device` has room for twice the total, measured: the same with
    tensors. `measure` auto leaves out what takes long on a CPU, never all of it.
    """
    if find_method(METHODS, subject.method).layer is None:
        raise OptionError(
            f"the method {subject.method} is not trained; signbit quantize --method {subject.method} --dry-run shows its sizes"
        )
    uses = []
    parameters = _parameters(subject)
    work = 6 * parameters * subject.sequences * subject.options.sequence_length

    def measurable(use: Use, work: float) -> bool:
        slow = device == "cpu" and work > _WORTH_MEASURING
        return measure != "never" and 2 * use.total < free_bytes(device) and (measure == "always" or not slow)

    for form in _TRAINING:
        with _shapes_alone(subject.config.model_type):
            use = _train(form, subject, "cpu", False)
        if measurable(use, work):
            note(f"measuring {form} in training")
            use = _train(form, subject, device, True)
        uses.append(use)
    for form in _PACKED:
        with _shapes_alone(subject.config.model_type):
            use = _pack(form, subject, "cpu", False)
        if measurable(use, work / 3):
            note(f"measuring {form}")
            use = _pack(form, subject, device, True)
        uses.append(use)
    use = _pack_one_bit(subject, device, False)
    if measurable(use, work) and 2 * uses[0].weights < free_bytes(device):  # latents come before signs
        note(f"measuring {ONE_BIT}")
        use = _pack_one_bit(subject, device, True)
    return [*uses, use]


def _parameters(subject: Subject) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in _dense(subject, torch.bfloat16).parameters())


def products(subject: Subject) -> Products:
    """The matrix products of the subject's blocks, for `signbit.evaluate.energy`."""
    with torch.device("meta"):
        targets = find_structure(_dense(subject, torch.bfloat16)).targets
    return linears_of(((t.out_features, t.in_features) for t in targets), subject.config.get_text_config())
