"""The plugin by which vLLM runs packed directories: `vllm.general_plugins` calls `register` in each of its processes.

vLLM makes one linear layer of q, k, v and one of gate, up. Here such a layer holds its parts as they were packed, one
PackedLinear each, whatever their terms are, and puts their outputs side by side. Nothing is unpacked or packed anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.utils import set_weight_attrs

from signbit import format as packed_format
from signbit import ops
from signbit.errors import FormatError, OptionError
from signbit.format import Description, Int8Spec
from signbit.format.description import QUANT_METHOD
from signbit.linear import VARIABLE, LayerSpec, PackedLinear

logger = init_logger("vllm.signbit")

AGAIN = "copy the directory again, or quantize the source model again"
INSTEAD = "run it with transformers (signbit generate, signbit chat)"
#: The key of vLLM's additional_config that chooses the mode of activations.
ACTIVATIONS = "signbit_activations"
#: What vLLM's fused layers are made of, where a model's class does not say it.
_PARTS = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
_SHARDS = {None: 0, "q": 0, "k": 1, "v": 2}


def register() -> None:
    """Adds `quant_method: signbit` to vLLM's table of quantizations; it may be called again."""
    register_quantization_config(QUANT_METHOD)(SignbitVllmConfig)


class SignbitVllmConfig(QuantizationConfig):
    """What vLLM asks about a packed directory: which of its layers are packed, in int8, or dense.

    Raises OptionError, saying why, for what vLLM cannot run as it was packed.
    """

    def __init__(self, description: Description) -> None:
        super().__init__()
        self.description = description
        self.layers: dict[str, LayerSpec] = dict(description.layers)
        self.embedding_is_made = False
        for name, spec in self.layers.items():
            if spec.norm_out == "batch_absmax":
                raise OptionError(
                    f"{name} brings its output to the largest of the whole batch (BitNet-Transformers), and vLLM's "
                    f"batches mix requests: {INSTEAD}"
                )

    def get_name(self) -> Any:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return list(ops.KERNEL_FLOATS)

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SignbitVllmConfig:
        return cls(Description.from_dict(config))

    def maybe_update_config(self, model_name: str, *args: Any, **kwargs: Any) -> None:
        if not Path(model_name).is_dir():
            logger.warning(
                "signbit: %s is no local directory, so its tensors_sha256 is not compared; shapes are", model_name
            )
            return
        headers = packed_format.read_headers(packed_format.weight_files(model_name))
        packed_format.verify(headers, self.description)
        expected = self.description.tensors_sha256
        if expected is not None and packed_format.headers_sha256(headers) != expected:
            raise FormatError(
                f"{model_name}: the tensors do not match tensors_sha256 in config.json; the file was damaged or "
                f"changed; {AGAIN}"
            )

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, VocabParallelEmbedding):
            return self._vocabulary_method(layer, prefix)
        if not isinstance(layer, LinearBase):
            self._refuse_packed_experts(prefix)
            return None
        parts = self._parts(prefix)
        if not any(self.layers.get(name) for name in parts):
            return UnquantizedLinearMethod()
        if isinstance(layer, QKVParallelLinear) and len(parts) == 1 and not prefix.endswith(".qkv_proj"):
            raise OptionError(
                f"{prefix} holds q, k and v in one matrix whose rows vLLM orders anew, which packed rows are not: {INSTEAD}"
            )
        self._refuse_dense_embedding()
        return PackedMethod({name: self.layers.get(name) for name in parts}, _activations())

    def _refuse_dense_embedding(self) -> None:
        """The embedding comes before the blocks; where vLLM's model did not ask for its method, it cannot be int8."""
        is_int8 = any(spec.kind == "embedding" for spec in self.description.int8.values())
        if is_int8 and not self.embedding_is_made and get_pp_group().is_first_rank:
            raise OptionError(
                f"vLLM's model for {_model_type()} takes a dense embedding only: quantize without --head int8"
            )

    def _parts(self, prefix: str) -> list[str]:
        """The names in the checkpoint of the layers that vLLM's layer `prefix` is made of."""
        stem, dot, last = prefix.rpartition(".")
        names = {**_PARTS, **self.packed_modules_mapping}.get(last, [last])
        return [prefix] if prefix in self.layers else [stem + dot + name for name in names]

    def _vocabulary_method(self, layer: VocabParallelEmbedding, prefix: str) -> QuantizeMethodBase | None:
        is_head = isinstance(layer, ParallelLMHead)
        self.embedding_is_made |= not is_head
        if is_head and prefix in self.layers:
            return PackedMethod({prefix: self.layers[prefix]}, _activations())
        # An embedding is not given its name by every model; a directory has one at most.
        kind = "head" if is_head else "embedding"
        size = (layer.org_vocab_size, layer.embedding_dim)
        found = [s for s in self.description.int8.values() if s.kind == kind and (s.rows, s.columns) == size]
        if not found:
            return None
        if found[0].multiplier != 1 and not _model_type().startswith("gemma"):
            raise OptionError(
                f"the int8 embedding of {_model_type()} multiplies its rows by {found[0].multiplier:g}, which is known of "
                f"vLLM's Gemma only: quantize without --head int8"
            )
        return Int8Method(found[0], _activations())

    def _refuse_packed_experts(self, prefix: str) -> None:
        if any(name.startswith(f"{prefix}.") for name in self.layers):
            raise OptionError(f"{prefix} is a mixture of packed experts, which this plugin does not run: {INSTEAD}")


def _model_type() -> str:
    return str(get_current_vllm_config().model_config.hf_text_config.model_type)


def _activations() -> str:
    mode = (get_current_vllm_config().additional_config or {}).get(ACTIVATIONS, "exact")
    if mode not in ops.ACTIVATION_MODES:
        raise OptionError(f"{ACTIVATIONS} in additional_config is {mode!r}; allowed: {', '.join(ops.ACTIVATION_MODES)}")
    return str(mode)


def _refuse_tensor_parallelism() -> None:
    ways = get_tensor_model_parallel_world_size()
    if ways > 1:
        raise OptionError(
            f"tensor_parallel_size is {ways}: packed matrices are not divided between processes; use 1 (a packed model "
            "takes a tenth of the memory), or several servers"
        )


class PackedMethod(LinearMethodBase):
    """One of vLLM's linear layers, made of packed layers; a part whose spec is None was kept dense."""

    def __init__(self, parts: Mapping[str, LayerSpec | None], activations: str) -> None:
        self.specs = dict(parts)
        self.activations = activations
        self.loaded: list[dict[str, Tensor]] = [{} for _ in parts]

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        *args: Any,
        params_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        """Registers the names under which vLLM will hand over the parts' tensors."""
        _refuse_tensor_parallelism()
        self.rows = output_partition_sizes if len(self.specs) > 1 else [sum(output_partition_sizes)]
        if isinstance(layer, VocabParallelEmbedding):
            self.rows = [layer.org_vocab_size]  # without vLLM's padding
        self._check_sizes(input_size_per_partition)
        dtypes = {"weight": torch.get_default_dtype()}
        for spec in self.specs.values():
            if spec is not None:
                dtypes |= {name: dtype for name, (dtype, _) in spec.shapes(_no_lengths(spec)).items()}
        for name, dtype in dtypes.items():
            place = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            set_weight_attrs(place, {"weight_loader": partial(self._take, name)})
            layer.register_parameter(name, place)
        self.names = tuple(dtypes)

    def _check_sizes(self, columns: int) -> None:
        for (name, spec), rows in zip(self.specs.items(), self.rows, strict=True):
            if spec is None:
                continue
            packed = [spec.weights[-1].out_features, spec.weights[0].in_features]
            if packed != [rows, columns]:
                raise FormatError(f"{name} is {packed} in config.json, {[rows, columns]} in vLLM's model")

    def _take(self, name: str, place: nn.Parameter, tensor: Tensor, shard: Any = None) -> None:
        index = shard if isinstance(shard, int) else _SHARDS.get(shard) if not isinstance(shard, tuple) else None
        if index is None or index >= len(self.loaded) or (shard is None and len(self.loaded) > 1):
            raise OptionError(
                f"vLLM hands over {name} as part {shard!r} of {', '.join(self.specs)}, which were packed one by one: {INSTEAD}"
            )
        self.loaded[index][name] = tensor.clone()  # the loader's lies in the mapped file

    def process_weights_after_loading(self, layer: Any) -> None:
        """Builds the parts and brings them into the kernels' order; what vLLM handed over is dropped."""
        biases = self._biases(layer)
        parts = [
            self._packed(name, spec, self.loaded[i], biases[i])
            if spec
            else self._dense(name, self.loaded[i], biases[i])
            for i, (name, spec) in enumerate(self.specs.items())
        ]
        for name in self.names:
            delattr(layer, name)
        self.loaded = []
        layer.parts = nn.ModuleList(parts)

    def _biases(self, layer: Any) -> list[Tensor | None]:
        """The bias of each part: vLLM keeps one for all, or adds it later (`skip_bias_add`)."""
        for name, spec in self.specs.items():
            if spec is not None and spec.bias != (layer.bias is not None):
                raise FormatError(f"{name} has {'a' if spec.bias else 'no'} bias, vLLM's layer {_has(layer.bias)}")
        if layer.bias is None or getattr(layer, "skip_bias_add", False):
            return [None] * len(self.specs)
        return list(layer.bias.data[: sum(self.rows)].split(self.rows))

    def _packed(self, name: str, spec: LayerSpec, tensors: dict[str, Tensor], bias: Tensor | None) -> PackedLinear:
        lengths = {t: tensors[t].numel() for t in _no_lengths(spec) if t in tensors}
        shapes = spec.shapes({**_no_lengths(spec), **lengths})
        for tensor, (dtype, shape) in shapes.items():
            found = tensors.get(tensor)
            if found is None or (found.dtype, tuple(found.shape)) != (dtype, shape):
                what = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
                raise FormatError(f"the tensor {name}.{tensor} is {what}, not {dtype} {list(shape)}; {AGAIN}")
        device = str(next(iter(tensors.values())).device)
        layer = PackedLinear.from_spec(replace(spec, bias=False), lengths, torch.get_default_dtype(), device)
        layer.load_state_dict({tensor: tensors[tensor] for tensor in shapes})
        for weight in layer.weights:
            weight.check()
        if bias is not None:
            layer.bias = nn.Parameter(bias, requires_grad=False)
        layer.activations = self.activations
        if (reason := layer.prepare()) is not None:
            logger.warning_once("signbit: packed layers are multiplied by plain torch: %s", reason)
        return layer

    def _dense(self, name: str, tensors: dict[str, Tensor], bias: Tensor | None) -> nn.Linear:
        if "weight" not in tensors:
            raise FormatError(f"the tensor {name}.weight is missing; {AGAIN}")
        rows, columns = tensors["weight"].shape
        layer = nn.Linear(columns, rows, bias=bias is not None, device="meta")
        layer.weight = nn.Parameter(tensors["weight"].to(torch.get_default_dtype()), requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias, requires_grad=False)
        return layer

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        # The parts hold the bias already.
        outputs = [part(x) for part in layer.parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


class Int8Method(QuantizeMethodBase):
    """The embedding, the output head, or the two in one, as int8 codes and a scale a row."""

    def __init__(self, spec: Int8Spec, activations: str) -> None:
        self.spec = spec
        self.activations = activations

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        *args: Any,
        params_dtype: torch.dtype,
        weight_loader: Callable[..., None],
        **kwargs: Any,
    ) -> None:
        """Registers codes int8 [rows, columns] and the scale [rows]; vLLM's own loader pads them."""
        _refuse_tensor_parallelism()
        rows = sum(output_partition_sizes)
        codes = torch.empty(rows, input_size_per_partition, dtype=torch.int8)
        for name, tensor in (("weight", codes), ("scale", torch.empty(rows, dtype=params_dtype))):
            place = nn.Parameter(tensor, requires_grad=False)
            set_weight_attrs(place, {"output_dim": 0, "weight_loader": weight_loader})
            layer.register_parameter(name, place)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        layer.weight, layer.scale = embed_tokens.weight, embed_tokens.scale
        return layer

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        # Without the multiplier: where there is one (Gemma), vLLM's model multiplies by it.
        scale = F.embedding(ids, layer.scale.unsqueeze(1))
        return F.embedding(ids, layer.weight).to(scale.dtype) * scale

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = ops.int8_linear(x, layer.weight, layer.scale, self.activations)
        return y if bias is None else (y + bias).to(y.dtype)


def _no_lengths(spec: LayerSpec) -> dict[str, int]:
    """The tensors whose length the spec leaves open, each of length 0."""
    return {f"{name}{place}": 0 for name in VARIABLE for place in ("", *(f"_{i}" for i in range(len(spec.weights))))}


def _has(bias: Any) -> str:
    return "none" if bias is None else "one"
