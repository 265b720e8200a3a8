"""The quantizer that transformers calls: packed layers into a skeleton before loading, or quantizing after it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from signbit import format as packed_format
from signbit import ptq
from signbit.errors import FormatError, OptionError
from signbit.format import Description, Int8Spec, TensorHeader
from signbit.hub.config import SignbitConfig
from signbit.linear import VARIABLE, Int8Embedding, Int8Head, PackedLinear
from signbit.models import Experts, Report, fuse_, is_fused, linear_parts, set_module
from signbit.version import VERSION

logger = logging.get_logger(__name__)


def describe(model: nn.Module, settings: dict[str, Any]) -> Description:
    """The description of all packed layers that `model` holds."""
    layers, int8 = {}, {}
    embeddings: dict[int, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            layers[name] = module.spec
        elif isinstance(module, Int8Embedding):
            embeddings[id(module.weight)] = name
            rows, columns = module.weight.shape
            int8[name] = Int8Spec("embedding", rows, columns, multiplier=module.multiplier)
        elif isinstance(module, Int8Head):
            tied = embeddings.get(id(module.weight))
            rows, columns = module.weight.shape
            int8[name] = Int8Spec("head", rows, columns, bias=module.bias is not None, tied_to=tied)
    return Description(layers, int8, settings)


def quantize_(
    model: nn.Module,
    config: SignbitConfig,
    windows: Tensor | None = None,
    progress: ptq.Progress | None = None,
) -> Report:
    """Quantizes a transformers model in place as `config` says; returns what was done to each layer and why.

    `windows` int64 [samples, T] is calibration text, for methods that need it (`signbit.draw_windows` makes some).
    Raises StructureError, OptionError or WeightError, the first two before anything is changed.
    """
    if config.head == "binary":
        raise OptionError(
            "a binary output head is trained: signbit finetune or distill --head binary; use keep or int8"
        )
    if config.head == "int8":
        ptq.plan_head(model)  # refuses before anything is changed
    report = ptq.quantize_(model, config.plan, windows, progress)
    if config.head == "int8":
        report = ptq.with_head(report, ptq.quantize_head_(model))
    calibration = None if windows is None else {"samples": windows.shape[0], "sequence_length": windows.shape[1]}
    finish_(model, config, report, calibration)
    prepare_(model)
    return report


def finish_(model: nn.Module, config: SignbitConfig, report: Report, calibration: dict[str, Any] | None = None) -> None:
    """Makes a model whose layers are packed one that transformers takes for a quantized one.

    `calibration` says in config.json what the inputs were measured on.
    """
    settings = {**config.settings(), "signbit_version": VERSION}
    if calibration is not None:
        settings["calibration"] = calibration
    config.description = describe(model, settings)
    attach_(model, config, report)


def attach_(model: nn.Module, config: SignbitConfig, report: Report) -> None:
    """Gives `model` the quantizer that saves it: `config` describes its packed layers already."""
    quantizer = SignbitHfQuantizer(config, pre_quantized=True)
    quantizer.report = report
    model.hf_quantizer = quantizer
    quantizer.mark(model)


def prepare_(model: nn.Module) -> None:
    """Brings the packed layers of `model` into the order of the kernels, those with one input into one launch."""
    prepare_layers_(model)
    fuse_(model)


def prepare_layers_(model: nn.Module) -> None:
    """Brings the packed layers of `model`, or of a part of one, into the order of the kernels.

    A layer that the kernels do not multiply is slow: one warning says how many there are and why.
    """
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    reasons = Counter(reason for layer in layers if (reason := layer.prepare()) is not None)
    for reason, count in reasons.items():
        logger.warning_once(f"signbit: {count} of {len(layers)} packed layers are multiplied by plain torch: {reason}")


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that a saved directory holds: the state dict, tied tensors once, as save_pretrained writes it."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    state: dict[str, Tensor] = remove_tied_weights_from_state_dict(model.state_dict(), model)
    return state


class SignbitHfQuantizer(HfQuantizer):
    """Connects packed layers to `from_pretrained` and `save_pretrained`."""

    quantization_config: SignbitConfig
    requires_calibration = False
    #: What was done to each layer, where this process quantized the model; `save` puts it in the card.
    report: Report | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        device_map = kwargs.get("device_map")
        devices = {str(d) for d in device_map.values()} if isinstance(device_map, dict) else set()
        if not self.pre_quantized and len(devices) > 1 and devices & {"cpu", "disk"}:
            raise OptionError(
                "a model cannot be quantized while it loads with layers offloaded to the CPU or the disk; quantize it "
                "first (signbit quantize MODEL -o OUT), then load OUT with this device_map"
            )

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        description = self.quantization_config.description
        if not self.pre_quantized or description is None:
            return model
        if checkpoint_files is None:
            raise FormatError("a packed model is loaded from its directory, not from a state_dict")
        headers = packed_format.read_headers(checkpoint_files)
        packed_format.verify(headers, description)
        _pack_skeleton(model, description, headers)
        if description.tensors_sha256 is not None:
            digest = packed_format.headers_sha256(headers)
            if digest != description.tensors_sha256:
                raise FormatError(_why_digest_differs(model, headers, description))
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if not self.pre_quantized:
            report = quantize_(model, self.quantization_config)
            logger.warning_once(
                f"signbit: {report.share:.1%} of the repeated blocks' parameters are binarized, at "
                f"{report.bits_per_weight:.3f} true bits per weight (model.hf_quantizer.report has every layer)"
            )
            return model
        description = self.quantization_config.description
        if description is not None and description.tensors_sha256 is None:
            for module in model.modules():
                if isinstance(module, PackedLinear):
                    for weight in module.weights:
                        weight.check()
        self.mark(model)
        prepare_(model)
        return model

    def mark(self, model: nn.Module) -> None:
        """Leaves `model` as transformers expects a quantized one: frozen packed layers, config and flags set."""
        for module in model.modules():
            if isinstance(module, (PackedLinear, Int8Embedding, Int8Head)):
                module.requires_grad_(False)
        model.config.quantization_config = self.quantization_config  # type: ignore[union-attr]
        # save_pretrained would give some families' tensors back their names of old (GPT-NeoX's embed_out), which the
        # description does not know; a packed directory has the names that its modules have.
        model._weight_conversions = []  # type: ignore[assignment]
        model.is_quantized = True  # type: ignore[assignment]
        model.quantization_method = self.quantization_config.quant_method

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        dtype = dtype or torch.float32
        shared: dict[int, nn.Parameter] = {}  # a tied pair of int8 layers becomes a tied pair of dense ones
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedLinear):
                if module.norm_in != "none" or module.norm_out != "none" or module.act_bits:
                    raise OptionError(f"{name} has norms or quantized activations, which no dense layer has")
                set_module(model, name, _dense_linear(nn.Parameter(module.to_dense().to(dtype)), module.bias))
            elif isinstance(module, (Int8Embedding, Int8Head)):
                weight = shared.setdefault(id(module.weight), nn.Parameter(module.to_dense(dtype)))
                if isinstance(module, Int8Head):
                    set_module(model, name, _dense_linear(weight, module.bias))
                elif module.multiplier == 1:
                    set_module(model, name, nn.Embedding.from_pretrained(weight, freeze=False))
                else:
                    raise OptionError(f"{name} scales its rows, which no plain embedding does")
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        offloaded = any(tensor.is_meta for tensor in model.state_dict().values())
        tensors = None if offloaded else saved_tensors(model)
        self.describe(model, tensors)
        return tensors, {}

    def describe(self, model: nn.Module, tensors: Mapping[str, Tensor] | None) -> None:
        """Sets what config.json will say of `model` and the `tensors` that are saved."""
        config, old = self.quantization_config, self.quantization_config.description
        digest = None if tensors is None else packed_format.tensors_sha256(tensors)
        config.description = replace(describe(model, old.settings if old else {}), tensors_sha256=digest)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        # By adapters beside the packed layers: transformers itself refuses to train a quantized model without any.
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _dense_linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = weight
    if bias is not None:
        linear.bias = bias
    return linear


def _places(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Each of `names` that `model` has, and what it is called there: `model` may be the bare decoder (AutoModel)."""
    modules = {name for name, _ in model.named_modules()}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    candidates = {name: (name, name.removeprefix(prefix), prefix + name) for name in names}
    found = {name: next((c for c in some if c in modules), None) for name, some in candidates.items()}
    return {name: place for name, place in found.items() if place is not None}


def _is_bare(model: Any) -> bool:
    return model.get_output_embeddings() is None


def _split_packed_experts(model: nn.Module, description: Description) -> None:
    """Takes apart the mixtures of which an expert is packed; those that were kept whole stay so."""
    packed = list(description.layers)
    fused = [name for name, module in model.named_modules() if is_fused(module)]
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for name in fused:
        spellings = (name, name.removeprefix(prefix), prefix + name)
        if any(layer.startswith(f"{spelling}.") for spelling in spellings for layer in packed):
            set_module(model, name, Experts(name, model.get_submodule(name)))


def _pack_skeleton(model: nn.Module, description: Description, headers: Mapping[str, TensorHeader]) -> None:
    _split_packed_experts(model, description)
    places = _places(model, (*description.layers, *description.int8))
    lengths: dict[str, dict[str, int]] = {}
    for tensor, header in headers.items():
        module, _, last = tensor.rpartition(".")
        if last.startswith(VARIABLE):
            lengths.setdefault(module, {})[last] = prod(header.shape)
    for name, spec in description.layers.items():
        place = places.get(name)
        if place is None and description.settings.get("head") == "binary" and _is_bare(model):
            continue  # AutoModel gives the decoder without its head.
        if place is None:
            raise FormatError(f"{type(model).__name__} has no layer {name}, which config.json says is packed")
        old = model.get_submodule(place)
        weight, bias = linear_parts(old)
        expected = (spec.weights[-1].out_features, spec.weights[0].in_features)
        if tuple(weight.shape) != expected or (bias is not None) != spec.bias:
            raise FormatError(f"{name} is {expected} in config.json, {tuple(weight.shape)} in the model it describes")
        dtype = torch.get_default_dtype() if bias is None else bias.dtype
        layer = PackedLinear.from_spec(spec, lengths.get(name, {}), dtype, "meta")
        for buffer in layer.buffers():
            # What stays on the disk, transformers would make random numbers of (GPT-2's c_proj).
            buffer._is_hf_initialized = True  # type: ignore[attr-defined]
        set_module(model, place, layer)
    embeddings: dict[str, tuple[str, Int8Embedding]] = {}
    for name, int8 in sorted(description.int8.items(), key=lambda item: item[1].kind):  # embeddings first
        place = places.get(name)
        if place is None and int8.kind == "head":
            continue  # AutoModel gives the decoder without its head.
        if place is None:
            raise FormatError(f"{type(model).__name__} has no layer {name}, which config.json says is int8")
        codes = torch.empty(int8.rows, int8.columns, dtype=torch.int8, device="meta")
        scale = torch.empty(int8.rows, dtype=torch.get_default_dtype(), device="meta")
        if int8.kind == "embedding":
            embedding = Int8Embedding(codes, scale, int8.multiplier)
            set_module(model, place, embedding)
            embeddings[name] = (place, embedding)
            continue
        bias = torch.empty(int8.rows, dtype=scale.dtype, device="meta") if int8.bias else None
        head = Int8Head(codes, scale, bias)
        if int8.tied_to is not None and int8.tied_to not in embeddings:
            raise FormatError(f"{name} is tied to {int8.tied_to}, which config.json does not describe")
        if int8.tied_to is not None:
            embedding_place, tied = embeddings[int8.tied_to]
            ptq.tie_int8(model, head, tied, place, embedding_place)
        set_module(model, place, head)


def _why_digest_differs(model: nn.Module, headers: Mapping[str, TensorHeader], description: Description) -> str:
    again = "copy or download the directory again, or quantize the source model again"
    if list(getattr(model.config, "architectures", None) or []) == [type(model).__name__]:
        tied = set(getattr(model, "all_tied_weights_keys", {}))
        names = set(model.state_dict())
        if missing := sorted(names - tied - set(headers)):
            return f"the tensor {missing[0]} is missing; {again}"
        if extra := sorted(set(headers) - names):
            return f"the tensor {extra[0]} is not one of this model's; {again}"
    files = ", ".join(sorted({str(header.file) for header in headers.values()}))
    return f"{files}: the tensors do not match tensors_sha256 in config.json; the file was damaged or changed; {again}"
