"""From a student's start and a teacher's directory to a run's, from a run's to a packed one, and a teacher's logits."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState, init_empty_weights
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from signbit.data import (
    Blocks,
    TaughtBlocks,
    TeacherLogits,
    TokenFile,
    TrainingData,
    check_logits_name,
    read_teacher_logits,
    token_file,
    write_teacher_logits,
)
from signbit.data.calibration import Progress
from signbit.data.tokenfile import tokenizer_digest, vocabulary_size
from signbit.errors import FormatError, OptionError, TrainingError
from signbit.format import read_description
from signbit.hub.config import SignbitConfig
from signbit.hub.load import base_of, is_packed, load_any, load_config, load_tokenizer, torch_device
from signbit.hub.quantizer import finish_
from signbit.hub.save import save, save_dense
from signbit.hub.stream import source_digests
from signbit.linear import Int8Embedding, Int8Head, PackedLinear
from signbit.methods import METHODS
from signbit.methods.base import find_method
from signbit.models import Report, Shape, linear_parts, set_module, split_experts_
from signbit.models.structure import find_blocks
from signbit.train import (
    METRICS,
    RUN,
    Before,
    Budget,
    DistillTrainer,
    Lora,
    Objective,
    Schedule,
    Trained,
    TrainOptions,
    check_length,
    last_checkpoint,
    pack_training_,
    start_dense_,
    start_lora_,
    start_training_,
    train_parts_,
)
from signbit.train.checkpoints import check_checkpoint, read_json, write_whole
from signbit.train.plot import plot_run
from signbit.train.spikes import checkpoint_without
from signbit.version import VERSION

#: Called with the name of a source, how much of it is tokenized, and how much there is.
Tokenizing = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Start:
    """What a student starts from: a model's weights, or random ones in a model's shape or another."""

    model: str | None = None
    """Directory or hub id."""
    random: bool = False
    """Take the model's shape and not its weights."""
    shape: Shape | None = None
    """Where there is no model."""
    goes_on: bool = False
    """Whether `model` is a packed directory, or the directory of a run, whose binary layers are trained on as they are. A
    packed model is else a dense one that a student starts from like any other."""
    source: str | None = None
    """Full-precision model that a packed directory was made of: latents get the magnitudes of its weights."""
    masks: str | None = None
    """Packed directory of the same model, whose salient weights the student's are."""

    def __post_init__(self) -> None:
        if (self.model is None) == (self.shape is None):
            raise OptionError("a student starts from a model or from a shape; give one of both")
        if self.source is not None and (not self.goes_on or is_run(self.model)):
            raise OptionError(
                f"--source is for a student that goes on from a packed directory, and {self.model} is none; leave it out"
            )
        if self.masks is not None and (self.goes_on or self.model is None or self.random):
            raise OptionError(
                "--masks is for a student that starts from a model in full precision: one that goes on has its own; leave it "
                "out"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; what only some students have is left out where they have not."""
        values = asdict(self)
        return {k: v for k, v in values.items() if v or k not in ("goes_on", "source", "masks")}

    def digests(self) -> dict[str, str]:
        """What tells the packed directories apart, wherever they lie: the SHA-256 of their tensors."""
        packed = {"model": self.model if self.goes_on and not is_run(self.model) else None, "masks": self.masks}
        found = {key: read_description(path)[1].tensors_sha256 for key, path in packed.items() if path is not None}
        return {key: digest for key, digest in found.items() if digest is not None}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run gives: what `run.json` keeps, and what a resumed run must agree with."""

    start: Start
    teacher: str | None
    tokenizer: str
    config: SignbitConfig | None
    """How the student is binary; None trains it in full precision."""
    data: tuple[str, ...]
    objective: Objective
    options: TrainOptions
    schedule: Schedule
    trained: Trained
    teacher_logits: str | None = None
    """File of what the teacher answers to the data, in the place of the teacher beside the student."""
    lora: Lora | None = None
    """Adapters beside the packed layers of the start, which are trained in their place."""

    def __post_init__(self) -> None:
        if self.lora is not None and (self.trained.train_norms or self.trained.train_embeddings):
            raise OptionError(
                "with --lora nothing but the adapters is trained; leave out --train-norms and --train-embeddings"
            )
        if self.lora is not None and self.options.cuda_graph:
            raise OptionError(
                "--lora goes without --cuda-graph, for packed layers unpack in the backward pass; leave it out"
            )
        if self.teacher_logits is not None:
            self.objective.check_top()
            self.options.check_top()
        if not self.objective.needs_teacher:
            self.options.check_alone("give --teacher and a loss that looks at it (--kd-alpha)")
        if self.teacher is None and (self.objective.needs_teacher or self.teacher_logits is not None):
            raise OptionError(
                "the objective looks at a teacher, and there is none; give one, or --kd-alpha 0 --kd-beta 0"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; "lora" is left out where there is none."""
        adapters = {} if self.lora is None else {"lora": asdict(self.lora)}
        return {
            **adapters,
            "signbit": VERSION,
            "start": self.start.to_dict(),
            "teacher": self.teacher,
            "tokenizer": self.tokenizer,
            "config": None if self.config is None else self.config.settings(),
            "data": list(self.data),
            "objective": asdict(self.objective),
            "options": json.loads(json.dumps(asdict(self.options))),
            "schedule": asdict(self.schedule),
            "trained": asdict(self.trained),
        }


def _config(settings: dict[str, Any]) -> SignbitConfig:
    values = {key: value for key, value in settings.items() if key not in ("options", "signbit_version", "calibration")}
    return SignbitConfig(**values, **settings["options"])


def is_run(name: str | None) -> bool:
    """Whether `name` is the directory of a training run."""
    return name is not None and (Path(name) / RUN).is_file()


def salient_options(name: str) -> dict[str, Any]:
    """How the salient weights of a packed directory were chosen, in the options of pbllm; raises OptionError if it has none."""
    settings = read_description(name)[1].settings if is_packed(name) else {}
    options = settings.get("options", {})
    if "saliency" not in options:
        raise OptionError(f"--masks {name} is no packed directory of pbllm or pb-gptq; make one with signbit quantize")
    return {key: options[key] for key in ("salient", "saliency")}


def config_to_go_on(name: str, source: str | None = None) -> SignbitConfig | None:
    """How the student is binary that goes on from `name`: a run, or a packed directory; None for a model that is neither.

    `source` is the one that its latents get magnitudes of. A packed layer with shifts, and one with a `source`, goes on
    with a scale that is learned. Raises FormatError for a damaged directory, OptionError for what is not trained.
    """
    if is_run(name):
        run = read_json(Path(name) / RUN)
        settings = run["config"]
        if "lora" in run:
            raise OptionError(f"{name} is a run of adapters, from which nothing goes on but itself: --lora --resume")
        if settings is None:
            raise OptionError(
                f"{name} is a run in full precision; pack it (signbit pack {name} -o OUT) and start from OUT"
            )
        return _config(settings)
    if not is_packed(name):
        return None
    _, description = read_description(name)
    settings = dict(description.settings)
    if "method" not in settings:
        raise FormatError(f"{name} does not say by which method it was made; quantize the source model again")
    if find_method(METHODS, settings["method"]).layer is None:
        settings["method"] = "pbllm"  # PB-GPTQ's result is one of the same form
    if settings.get("head") == "int8":
        settings["head"] = "keep"  # it is trained as a dense one
    specs = [spec for layer in description.layers.values() for spec in layer.weights]
    options = dict(settings["options"])
    if settings["method"] == "pbllm" and (source is not None or any(spec.shift for spec in specs)):
        options["scale"] = "learned"
        settings["rules"] = [
            (pattern, {k: v for k, v in values.items() if k != "scale"})
            for pattern, values in settings.get("rules", ())
        ]
    return _config({**settings, "options": options})


def _dense(name: str, device: str, dtype: torch.dtype, start: bool = True) -> Any:
    """A model with dense linears, embeddings and head: a packed one's are unpacked.

    What no dense layer computes (norms and quantized activations of packed layers, int8 embeddings with a multiplier) stays
    packed in a teacher; in a `start` it raises FormatError.
    """
    model = load_any(name, str(dtype).removeprefix("torch."), device)
    _unpack_(model, name, device, dtype, start)
    return model


def _unpack_(model: Any, name: str, device: str, dtype: torch.dtype, start: bool) -> None:
    """Puts dense layers in the places of packed ones, in place, as `_dense` says."""
    tied: dict[int, torch.nn.Parameter] = {}
    for path, module in list(model.named_modules()):
        if not isinstance(module, (PackedLinear, Int8Embedding, Int8Head)):
            continue
        if isinstance(module, PackedLinear):
            plain = module.norm_in == module.norm_out == "none" and not module.act_bits
        else:
            plain = getattr(module, "multiplier", 1.0) == 1
        if plain:
            set_module(model, path, _unpacked(module, dtype, tied).to(device))
        elif start:
            raise FormatError(
                f"{name}: {path} has norms, quantized activations or a multiplier of its own; it cannot be a start"
            )
    if getattr(model, "hf_quantizer", None) is not None:  # no longer: transformers refuses to train a quantized model
        model.hf_quantizer.remove_quantization_config(model)
        model.hf_quantizer = None


def _unpacked(
    module: PackedLinear | Int8Embedding | Int8Head, dtype: torch.dtype, tied: dict[int, torch.nn.Parameter]
) -> torch.nn.Module:
    """The dense layer that computes what a packed one does; of int8 codes in two places, in `tied`, one tensor is made."""
    if isinstance(module, PackedLinear):
        weight = torch.nn.Parameter(module.to_dense(dtype))
    else:
        place = module.weight.data_ptr()
        if place not in tied:
            tied[place] = torch.nn.Parameter(module.to_dense(dtype))
        weight = tied[place]
    rows, columns = weight.shape
    dense: torch.nn.Module
    if isinstance(module, Int8Embedding):
        dense = torch.nn.Embedding(rows, columns, device="meta")
    else:
        dense = torch.nn.Linear(columns, rows, bias=module.bias is not None, device="meta")
        if module.bias is not None:
            dense.bias = torch.nn.Parameter(module.bias.detach().to(dtype))
    dense.weight = weight
    return dense


def _files(
    sources: TrainingData,
    tokenizer: Any,
    folder: Path,
    data_dir: str | None,
    progress: Tokenizing | None,
    chats: int | None = None,
) -> list[TokenFile]:
    files = []
    for source in sources.sources:
        step = None if progress is None else functools.partial(progress, source.name)
        files.append(token_file(tokenizer, source, folder, data_dir, step, chats))
    return files


def _data(
    recipe: Recipe, tokenizer: Any, folder: Path, data_dir: str | None, progress: Tokenizing | None
) -> tuple[Blocks, Blocks | None]:
    options, sources = recipe.options, TrainingData.parse(recipe.data)
    # Conversations are for what learns the next token: a teacher would be heard on padding and on what the user says.
    plain = recipe.objective.needs_teacher or options.cuda_graph
    length = None if plain else options.sequence_length
    files, weights = _files(sources, tokenizer, folder, data_dir, progress, length), sources.weights
    if plain and (only := [file.source for file in files if file.learnt]):
        raise OptionError(
            f"{only[0]} says which of its tokens are learnt from, which is for a run without a teacher and --cuda-graph"
        )
    held = options.validation_blocks
    # More than any run takes: how many chunks are skipped is not known before.
    train = Blocks(
        files, options.sequence_length, 10_000_000 * options.batch_size, weights, options.seed, "train", held
    )
    if held == 0:
        return train, None
    return train, Blocks(files, options.sequence_length, held * len(files), weights, options.seed, "validation", held)


def _model_digest(model: str) -> str:
    """SHA-256, in hex, of what decides what a model answers: its config and weights, or the commit of a hub model."""
    parts = source_digests(model).items()
    decides = {k: v for k, v in parts if k.endswith((".safetensors", ".bin")) or k in ("config.json", "commit", "id")}
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def teacher_logits(
    teacher: str,
    data: Sequence[str],
    out: str | Path,
    length: int,
    top: int = 64,
    batch: int = 8,
    device: str = "cpu",
    dtype: str = "auto",
    data_dir: str | None = None,
    cache: str | Path | None = None,
    tokenizing: Tokenizing | None = None,
    progress: Progress | None = None,
) -> TeacherLogits:
    """Writes what `teacher` answers to all of `data` to the file `out` (.logits); opens it if it is there.

    `data` are sources as `distill` has them, whose weights mean nothing here. `cache` is where token files are kept
    (default: data, beside `out`). Raises what `write_teacher_logits` raises.
    """
    check_logits_name(out)
    sources = TrainingData.parse(data)
    model, tokenizer = load_any(teacher, dtype, device), load_tokenizer(teacher)
    folder = Path(cache) if cache else Path(out).parent / "data"
    files = _files(sources, tokenizer, folder, data_dir, tokenizing)
    return write_teacher_logits(model, _model_digest(teacher), files, out, length, top, batch, progress)


def train(
    recipe: Recipe,
    out: str | Path,
    resume: bool = False,
    data_dir: str | None = None,
    cache: str | Path | None = None,
    progress: Tokenizing | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> Path | None:
    """Trains a student as the recipe says, in the directory `out`; returns its last checkpoint.

    Of several processes the first returns it, the others None. `resume` goes on at the newest complete checkpoint. `cache`
    is where token files are kept (default: out/data). `note` is told what the student is, where no model's weights say it.
    Raises TrainingError for a directory that holds another run, or none to go on with, and for a run that cannot go on;
    DataError for teacher's logits of another model, or of other text; OptionError for a tokenizer that is not the model's.
    """
    out = Path(out)
    _check_devices()
    checkpoint = _check_run(recipe, out, resume)
    options = recipe.options
    check_length(options.max_steps, options.max_minutes, options.max_passes)
    tokenizer = load_tokenizer(recipe.tokenizer)
    logits = None if recipe.teacher_logits is None else read_teacher_logits(recipe.teacher_logits)
    if logits is not None:
        assert recipe.teacher is not None
        logits.check(_model_digest(recipe.teacher), tokenizer_digest(tokenizer), options.sequence_length)
    where = "cuda" if torch.cuda.is_available() else "cpu"
    if options.teacher_device is not None:
        torch_device(options.teacher_device)
    folder = Path(cache) if cache else out / "data"
    with PartialState(cpu=not torch.cuda.is_available()).main_process_first():  # the others find what it made
        data, validation = _data(recipe, tokenizer, folder, data_dir, progress)
    if options.max_passes is not None:
        steps = max(round(options.max_passes * data.one_pass / options.batch_size), 1)
        options = replace(options, max_passes=None, max_steps=steps)
    budget = Budget(options.max_steps, options.max_minutes)
    for file in data.files:
        if file.learnt:
            found = file.recipe
            note(
                f"{file.source}: {found['conversations']} conversations, of which what the assistant says is learnt; "
                f"{found['cut']} are cut at {options.sequence_length} tokens, {found['left_out']} left out, in which it says "
                "nothing before"
            )
    tokens = [file.path.name for file in data.files]  # which tell its content
    told = None if logits is None else {"file": str(logits.path), **logits.recipe()}
    if resume:
        before = read_json(out / RUN)
        if before.get("tokens") != tokens:
            raise TrainingError(
                f"{out} is another run: the text has changed since ({before.get('tokens')} there, {tokens} here)"
            )
        _check_same_logits(out, before.get("teacher_logits") or {}, told or {})
    blocks: tuple[Any, Any] = data, validation
    if logits is not None:
        blocks = TaughtBlocks(data, logits), None if validation is None else TaughtBlocks(validation, logits)
    torch.manual_seed(options.seed)
    student, report = _student(recipe, tokenizer, where, note)
    teacher = None
    if recipe.objective.needs_teacher and logits is None:
        assert recipe.teacher is not None
        teacher = _teacher(recipe.teacher, options, where)
    if recipe.objective.kd_gamma > 0:
        for model in (student, teacher):
            if model is not None:
                model.set_attn_implementation("eager")
    trainer = DistillTrainer(
        student, teacher, recipe.objective, options, recipe.schedule, budget, *blocks, out,
        None if logits is None else logits.vocabulary,
    )  # fmt: skip
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(out / "tokenizer")
        described = {**recipe.to_dict(), "engine": trainer.engine, "tokens": tokens, "teacher_logits": told}
        described["start_digests"] = recipe.start.digests()
        described["report"] = asdict(report)
        write_whole(out / RUN, json.dumps(described, indent=2) + "\n")
    trainer.run(checkpoint)
    if not trainer.is_world_process_zero():
        return None
    plot_run(out / METRICS, out)
    last = last_checkpoint(out)
    assert last is not None
    return last


def _student(recipe: Recipe, tokenizer: Any, where: str, note: Callable[[str], None]) -> tuple[Any, Report]:
    """The model that is trained, float32, and what was done to its layers."""
    start, config = recipe.start, recipe.config
    if recipe.lora is not None:
        assert start.model is not None
        return _adapted(start.model, recipe.lora, where)
    if start.goes_on and is_run(start.model):
        assert start.model is not None
        student, report = _latent(Path(start.model), where)
        _prepare_embedding_(recipe, student, tokenizer)
        if config is None or config.settings() != read_json(Path(start.model) / RUN)["config"]:
            raise OptionError(
                f"{start.model} is a run with settings of its own, which its student keeps; leave them out"
            )
        train_parts_(student, recipe.trained)
        return student, report
    before = None
    if start.goes_on:
        assert start.model is not None
        student, packed = _opened(start.model, where)
        before = Before(packed)
        if start.source is not None:
            source = _dense(start.source, where, torch.float32)
            before = Before(packed, _weights_of(source, student, start.source, start.model))
        else:
            note(
                f"the latents that go on from {start.model} are its signs × |scale|; --source MODEL, the model it was made of, "
                "gives them |w − shift|"
            )
    else:
        student = _model(recipe, tokenizer, where, note)
        if start.masks is not None:
            masked, packed = _opened(start.masks, where)
            _weights_of(student, masked, start.model, start.masks)  # raises for another model's
            before = Before(packed, masks_alone=True)
    _prepare_embedding_(recipe, student, tokenizer)
    if config is None:
        return student, start_dense_(student, recipe.trained)
    method = find_method(METHODS, config.method)
    return student, start_training_(
        student, method, config.plan, recipe.trained, before=before, head=config.head == "binary"
    )


def _adapted(name: str, lora: Lora, device: str) -> tuple[Any, Report]:
    """A packed model with adapters beside its layers, and what there is; an int8 head becomes dense, as losses need it."""
    if not is_packed(name):
        raise OptionError(
            f"{name} is no packed directory, beside whose layers --lora puts adapters; give one that signbit quantize or "
            "pack wrote"
        )
    model = load_any(name, "float32", device)
    for path, module in list(model.named_modules()):
        if isinstance(module, Int8Head):
            set_module(model, path, _unpacked(module, torch.float32, {}).to(device))
    return model, start_lora_(model, lora)


def _opened(name: str, device: str) -> tuple[Any, dict[str, PackedLinear]]:
    """A packed model in which everything but its packed layers is dense and float32, and those by name.

    In their places stand linears without weights, on the meta device.
    """
    if not is_packed(name):
        raise OptionError(f"{name} is no packed directory; give one that signbit quantize or pack wrote")
    model = load_any(name, "float32", device)
    packed = {path: module for path, module in model.named_modules() if isinstance(module, PackedLinear)}
    for path, module in packed.items():
        rows, columns = module.out_features, module.in_features
        set_module(model, path, torch.nn.Linear(columns, rows, bias=module.bias is not None, device="meta"))
    _unpack_(model, name, device, torch.float32, start=True)
    return model, packed


def _weights_of(source: Any, opened: Any, source_name: str | None, packed_name: str) -> Callable[[str], torch.Tensor]:
    """The matrices of `source` by the names of layers; raises OptionError unless `opened`, packed, was made of it.

    What tells is content and no name: the embedding, which packing leaves as it is, or keeps in 8 bits.
    """
    one, other = (model.get_input_embeddings().weight.detach().float() for model in (source, opened))
    same = one.shape == other.shape
    if same:
        allowed = 0.0
        if _int8_embedding(packed_name):
            allowed = one.abs().amax(dim=1, keepdim=True) / 127 * 0.52  # half a step, rounded scales
        same = bool(((one - other).abs() <= allowed).all())
    if not same:
        raise OptionError(
            f"{packed_name} was not made of {source_name}: their embeddings differ; give the model that it was made of"
        )
    split_experts_(source)
    return lambda name: linear_parts(source.get_submodule(name))[0].detach()


def _int8_embedding(packed: str) -> bool:
    return any(spec.kind == "embedding" for spec in read_description(packed)[1].int8.values())


def _prepare_embedding_(recipe: Recipe, model: Any, tokenizer: Any) -> None:
    """What holds for every student's embedding: its padding token is learnt, and it has a row for each token."""
    embedding = model.get_input_embeddings()
    if getattr(embedding, "padding_idx", None) is not None:
        # Nothing is padded here, and the token may stand between documents: it is learnt like others.
        embedding.padding_idx = None
    needed, rows = vocabulary_size(tokenizer), embedding.weight.shape[0]
    if recipe.tokenizer != recipe.start.model and rows < needed:
        raise OptionError(
            f"the tokenizer {recipe.tokenizer} has {needed} tokens, the student a vocabulary of {rows}; give the tokenizer "
            "that belongs to it"
        )


def _model(recipe: Recipe, tokenizer: Any, where: str, note: Callable[[str], None]) -> Any:
    """The dense model that the student starts as, float32: as it is stored, or drawn at random.

    A random one has the teacher's vocabulary, or where there is no teacher its tokenizer's, if no model says another.
    """
    start, needed = recipe.start, vocabulary_size(tokenizer)
    if start.model is not None and (base := base_of(start.model)) is not None:
        raise OptionError(
            f"{start.model} is an adapter, from which no student starts; give the model beside which it stands: {base}"
        )
    if start.model is not None and not start.random:
        model = _dense(start.model, where, torch.float32)
    else:
        taught = (
            None if recipe.teacher is None else load_config(recipe.teacher, packed=True).get_text_config().vocab_size
        )
        if start.shape is not None:
            ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
            config = start.shape.config(taught or needed, **ids)
        else:
            assert start.model is not None
            config = load_config(start.model)
            config.get_text_config().vocab_size = taught or config.get_text_config().vocab_size
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(where)
        count = sum(parameter.numel() for parameter in model.parameters())
        words = config.get_text_config().vocab_size
        note(f"the student starts from random weights: {count:,} parameters, a vocabulary of {words}")
    embedding = model.get_input_embeddings()
    padding = getattr(embedding, "padding_idx", None)
    if padding is not None and (start.model is None or start.random):
        # Left at 0, as it is made, norms multiply the gradient of its row by hundreds in each layer.
        std = getattr(model.config.get_text_config(), "initializer_range", 0.02)
        torch.nn.init.normal_(embedding.weight.data[padding], std=std)
    return model


def _teacher(name: str, options: TrainOptions, where: str) -> Any:
    """The model to learn from, where and in what the options say."""
    device, kept = options.teacher_device or where, options.teacher_dtype
    halves = torch.device(device).type != "cpu" and options.precision != "float32"
    chosen = torch.bfloat16 if halves else torch.float32
    dtype = chosen if kept in ("auto", "int8") else getattr(torch, kept)
    teacher = _dense(name, device, dtype, start=False)
    if kept == "int8":
        prefix, blocks = find_blocks(teacher)
        for path, module in list(blocks.named_modules()):
            if isinstance(module, torch.nn.Linear):
                codes = Int8Head(*Int8Head.quantize(module.weight), module.bias)
                set_module(teacher, f"{prefix}.{path}", codes)
    return teacher


def _check_devices() -> None:
    """Raises OptionError where a launcher started more processes on this machine than it has GPUs."""
    place = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available() and place >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise OptionError(
            f"process {place + 1} of this machine has no GPU, for there {'is' if count == 1 else 'are'} {count}; "
            f"launch at most {count} processes a machine (--nproc_per_node {count})"
        )


def _check_run(recipe: Recipe, out: Path, resume: bool) -> Path | None:
    """The checkpoint to go on with; raises TrainingError where `out` does not fit."""
    run = out / RUN
    if not resume:
        if run.exists() or last_checkpoint(out) is not None:
            raise TrainingError(f"{out} holds a run already; go on with it by --resume, or give another directory")
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"{out} cannot be made ({error.strerror})") from error
        return None
    if not run.is_file():
        raise TrainingError(f"{out} holds no run to go on with; leave --resume out to begin one")
    before, now = read_json(run), recipe.to_dict()
    digests = recipe.start.digests()
    for key, digest in (before.get("start_digests") or {}).items():
        if digests.get(key) == digest:  # the same directory, wherever it lies
            for part in (now, now["start"]):
                for place in ("tokenizer", key):
                    if part.get(place) == now["start"][key]:
                        part[place] = before["start"][key]
        elif key in digests and before["start"].get(key) == now["start"].get(key):
            raise TrainingError(
                f"{out} is another run: {before['start'][key]} has changed since; give another directory"
            )
    skipped, skip = (values["options"].pop("skip_chunks", ()) for values in (before, now))
    if not {*skipped} <= {*skip}:
        raise TrainingError(
            f"{out} left out chunks of its data; name them again, and others if you like: "
            f"--skip-chunks {' '.join(map(str, skipped))}"
        )
    parts = ("start", "teacher", "tokenizer", "config", "data", "objective", "options", "schedule", "trained", "lora")
    for part in parts:
        there, here = before.get(part), now.get(part)
        if there != here:
            differs = part
            if isinstance(there, dict) and isinstance(here, dict):
                key = next(key for key in {**here, **there} if here.get(key) != there.get(key))
                differs = f"{key} ({there.get(key)!r} there, {here.get(key)!r} here)"
            raise TrainingError(f"{out} is another run: {differs} differs; give the same options, or another directory")
    checkpoint = checkpoint_without(out, recipe.options.skip_chunks, recipe.options.save_every)
    if checkpoint is not None:
        check_checkpoint(checkpoint)
    return checkpoint


def _check_same_logits(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    differ = [name for name in {**before, **now} if name != "file" and before.get(name) != now.get(name)]
    if differ:
        instead = f"give --teacher-logits {before['file']} as it was" if before else "leave out --teacher-logits"
        raise TrainingError(
            f"{out} is another run: the teacher's logits differ ({', '.join(differ)}); {instead}, or give another directory"
        )


def _latent(run: Path, device: str = "cpu") -> tuple[Any, Report]:
    """The student of a run's newest complete checkpoint, float32, and what was done to its layers."""
    checkpoint = last_checkpoint(run)
    if checkpoint is None:
        raise TrainingError(f"{run} holds no complete checkpoint; wait for --save-every steps")
    check_checkpoint(checkpoint)
    config = _config(read_json(run / RUN)["config"])
    method = find_method(METHODS, config.method)
    with init_empty_weights(), torch.no_grad():
        model = AutoModelForCausalLM.from_config(load_config(str(checkpoint)), dtype=torch.float32)
        report = start_training_(model, method, config.plan, Trained(), blank=True, head=config.head == "binary")
    state: dict[str, torch.Tensor] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):  # one, or shards
        try:
            state |= load_file(path)
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{path} cannot be read ({error}); it is damaged") from error
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    if unexpected or (missing := [name for name in missing if name not in tied]):
        name = (list(unexpected) or missing)[0]
        raise FormatError(f"{checkpoint}: the tensor {name} is {'unknown' if unexpected else 'missing'}; it is damaged")
    return model.to(device), report


def load_latent(run: str) -> Any:
    """The student of a run's newest complete checkpoint, float32 and in evaluation mode, its latents as they are.

    Raises TrainingError if there is no checkpoint or it holds adapters.
    """
    settings, checkpoint = read_json(Path(run) / RUN), last_checkpoint(Path(run))
    if checkpoint is None:
        raise TrainingError(f"{run} holds no complete checkpoint; wait for --save-every steps")
    if "lora" in settings:
        raise TrainingError(f"{run} trained adapters; give its checkpoint {checkpoint}")
    if settings["config"] is None:
        return load_any(str(checkpoint), "float32")
    return _latent(Path(run))[0].eval()


def _base(start: dict[str, Any]) -> str | None:
    """The model that a student, or the run that it went on from, began as; None if that was random."""
    base = None if start["random"] else start.get("source") or start["model"]
    if base is None or not is_run(base):
        return base
    return _base(read_json(Path(base) / RUN)["start"])


def pack(run: str | Path, out: str | Path, overwrite: bool = False, dtype: str = "float32") -> tuple[Path, int]:
    """Writes the newest complete checkpoint of `run` as a packed directory; returns it and how many latents were 0.

    `dtype` is what everything but signs is stored in; float32 loses nothing. A run in full precision has nothing to pack,
    and becomes an ordinary model directory. Raises TrainingError if there is no checkpoint, OptionError for what the packed
    layer cannot hold (BitNet's shifted activations).
    """
    run = Path(run)
    checkpoint = last_checkpoint(run)
    if not (run / RUN).is_file() or checkpoint is None:
        raise TrainingError(
            f"{run} holds no complete checkpoint; give the directory of a run of signbit distill or pretrain"
        )
    if dtype not in ("float32", "float16", "bfloat16"):
        raise OptionError(f"--dtype is {dtype!r}; float32, float16 and bfloat16 are allowed")
    check_checkpoint(checkpoint)
    settings, tokenizer = read_json(run / RUN), load_tokenizer(str(run / "tokenizer"))
    if "lora" in settings:
        raise TrainingError(
            f"{run} trained adapters, which cannot be merged into packed layers: the sum has more than a bit a weight. They "
            f"are used as they are: signbit generate {checkpoint}"
        )
    if settings["config"] is None:
        return save_dense(load_any(str(checkpoint), dtype), out, tokenizer, overwrite), 0
    config = _config(settings["config"])
    model, report = _latent(run)
    packed = pack_training_(model, report, dtype)
    model.to(getattr(torch, dtype))
    finish_(model, config, packed.report)
    stored = [] if dtype == "float32" else ["--dtype", dtype]
    start, command = settings["start"], shlex.join(["signbit", "pack", str(run), "-o", str(out), *stored])
    return save(model.eval(), out, tokenizer, packed.report, _base(start), command, overwrite), packed.zeros
