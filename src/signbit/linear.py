"""The layers: PackedLinear (the only one at inference), BinaryLinear (what methods train), and the int8 pair."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal, Protocol, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from signbit import bits, ops
from signbit.bits import SALIENT_BLOCK, Operands
from signbit.errors import OptionError, ShapeError
from signbit.weight import BinaryWeight, Salient

NormIn = Literal["none", "rms", "layer"]
NormOut = Literal["none", "layer", "batch_absmax"]


@dataclass(frozen=True)
class WeightSpec:
    """The shape of one BinaryWeight without its numbers: what config.json keeps, so that a skeleton can be built.

    How many positions are salient is not here: the file's own tensors tell, and `BinaryWeight.check` compares them.
    """

    out_features: int
    in_features: int
    planes: int = 1
    sign_planes: int = 1
    groups: int = 1
    scale_rows: bool = True
    shift: bool = False
    in_scale_planes: int = 0
    in_shift: bool = False
    salient_bits: int = 0
    salient_positions: Literal["none", "offsets", "bitmap"] = "none"
    dtype: str = "float16"

    @classmethod
    def of(cls, w: BinaryWeight) -> WeightSpec:
        """The spec that `w` obeys; all its float tensors must share one dtype."""
        floats = [w.scale, w.shift, w.in_scale, w.in_shift, w.salient.scale if w.salient else None]
        dtypes = {str(t.dtype).removeprefix("torch.") for t in floats if t is not None}
        if len(dtypes) > 1:
            raise ShapeError(f"the float tensors of one weight share a dtype; these have {sorted(dtypes)}")
        positions: Any = "none" if w.salient is None else "bitmap" if w.salient.counts is None else "offsets"
        return cls(
            out_features=w.out_features,
            in_features=w.in_features,
            planes=w.planes,
            sign_planes=w.signs.shape[0],
            groups=w.groups,
            scale_rows=w.scale.shape[1] == w.out_features,
            shift=w.shift is not None,
            in_scale_planes=0 if w.in_scale is None else w.in_scale.shape[0],
            in_shift=w.in_shift is not None,
            salient_bits=w.salient.bits if w.salient else 0,
            salient_positions=positions,
            dtype=dtypes.pop(),
        )

    def shapes(self, variable: Mapping[str, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name → (dtype, shape) of every tensor; `variable` gives the lengths of `salient_codes` and offsets."""
        rows, columns, floating = self.out_features, self.in_features, getattr(torch, self.dtype)
        width = -(-columns // 8)
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "weight": (torch.uint8, (self.sign_planes, rows, width)),
            "scale": (floating, (self.planes, rows if self.scale_rows else 1, self.groups)),
        }
        if self.shift:
            shapes["shift"] = (floating, (rows, self.groups))
        if self.in_scale_planes:
            shapes["in_scale"] = (floating, (self.in_scale_planes, columns))
        if self.in_shift:
            shapes["in_shift"] = (floating, (columns,))
        if self.salient_bits:
            shapes["salient_codes"] = (torch.uint8, (variable["salient_codes"],))
            if self.salient_positions == "offsets":
                shapes["salient_positions"] = (torch.uint8, (variable["salient_positions"],))
                shapes["salient_counts"] = (torch.uint8, (rows, -(-columns // SALIENT_BLOCK)))
            else:
                shapes["salient_positions"] = (torch.uint8, (rows, width))
            shapes["salient_scale"] = (floating, (rows,))
            shapes["salient_zero"] = (torch.uint8, (rows,))
        return shapes


@dataclass(frozen=True)
class LayerSpec:
    """The shape of one PackedLinear: its chain of weights and what a layer adds to them."""

    weights: tuple[WeightSpec, ...]
    norm_in: NormIn = "none"
    norm_in_eps: float = 1e-5
    act_bits: int = 0
    norm_out: NormOut = "none"
    norm_out_eps: float = 1e-5
    bias: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; fields at their default are left out."""

        def changed(value: Any) -> dict[str, Any]:
            defaults = {name: field.default for name, field in value.__dataclass_fields__.items()}
            return {k: v for k, v in asdict(value).items() if v != defaults[k]}

        return {**changed(self), "weights": [changed(weight) for weight in self.weights]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LayerSpec:
        """The inverse of `to_dict`; raises TypeError for an unknown or missing key."""
        weights = tuple(WeightSpec(**weight) for weight in values["weights"])
        return cls(**{**values, "weights": weights})

    def shapes(self, variable: Mapping[str, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name → (dtype, shape) of every packed tensor of the layer (its bias apart)."""
        return {
            _tensor_name(name, place): shape
            for place, weight in enumerate(self.weights)
            for name, shape in weight.shapes(
                {n: variable[_tensor_name(n, place)] for n in VARIABLE if _tensor_name(n, place) in variable}
            ).items()
        }


#: The tensors whose length the spec does not fix.
VARIABLE = ("salient_codes", "salient_positions")
_TENSORS = (
    "weight", "scale", "shift", "in_scale", "in_shift",
    "salient_codes", "salient_positions", "salient_counts", "salient_scale", "salient_zero",
)  # fmt: skip


#: Two threads may meet in the first inference. A child that is forked while one holds it gets its own.
_preparing = threading.Lock()


def _forked() -> None:
    global _preparing
    _preparing = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def _prepared_name(name: str, place: int) -> str:
    return f"prepared_{name}_{place}"


def _tensor_name(name: str, place: int) -> str:
    """The first weight's tensors have plain names; `weight` so that a plain nn.Linear refuses its shape."""
    return name if place == 0 else f"{name}_{place}"


def offloaded(module: nn.Module) -> bool:
    """Whether accelerate brings the tensors of `module` for each call and takes them away after it."""
    return bool(getattr(getattr(module, "_hf_hook", None), "offload", False))


def _in_forward_mode() -> bool:
    """Whether forward-mode derivatives are on: the kernels and our ops would lose them, torch's own ops do not."""
    return forward_ad._current_level >= 0


class Shared(Protocol):
    """Layers on a GPU that are given the same tensor and multiplied by one launch."""

    def join(self) -> None: ...
    def part(self) -> None: ...
    def __call__(self, layer: PackedLinear, x: Tensor, activations: str, as_op: bool) -> Tensor | None: ...


@final
class PackedLinear(nn.Module):
    """A linear layer on packed bits: y = norm_out(W · norm_in(x)) + bias, with W the product of a chain of BinaryWeights.

    `weights` is applied first to last (the chain has length one in every method so far). `norm_in`: "rms" or "layer",
    without affine part, over the K inputs; `norm_out`: "layer" without affine part over the N outputs (OneBit,
    arXiv 2402.11295), or "batch_absmax", clamp(128·y/(max|y| + 1e-5)) over the whole tensor (BitNet-Transformers'
    checkpoints). `act_bits`: 0 leaves activations to `activations` ("exact" or "int8"), 8 makes them int8 always,
    1 takes their signs (reference only). Input float [..., K], output of the same dtype [..., N].

    Raises OptionError for values outside these, ShapeError for weights that do not chain.
    """

    def __init__(
        self,
        weights: BinaryWeight | Sequence[BinaryWeight],
        bias: Tensor | None = None,
        norm_in: NormIn = "none",
        norm_in_eps: float = 1e-5,
        act_bits: int = 0,
        norm_out: NormOut = "none",
        norm_out_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        chain = (weights,) if isinstance(weights, BinaryWeight) else tuple(weights)
        for value, allowed, name in (
            (norm_in, ("none", "rms", "layer"), "norm_in"),
            (act_bits, (0, 1, 8), "act_bits"),
            (norm_out, ("none", "layer", "batch_absmax"), "norm_out"),
        ):
            if value not in allowed:
                raise OptionError(f"{name} is {value!r}; allowed: {', '.join(map(str, allowed))}")
        for first, second in pairwise(chain):
            if first.out_features != second.in_features:
                raise ShapeError(
                    f"a weight of {first.out_features} rows cannot feed one of {second.in_features} columns"
                )
        self.in_features, self.out_features = chain[0].in_features, chain[-1].out_features
        self._columns = tuple(w.in_features for w in chain)
        self._salient_bits = tuple(w.salient.bits if w.salient else 0 for w in chain)
        for place, weight in enumerate(chain):
            for name, tensor in zip(_TENSORS, weight.operands()[:-2], strict=True):
                self.register_buffer(_tensor_name(name, place), tensor)
        frozen = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.register_parameter("bias", frozen)
        self.norm_in: NormIn = norm_in
        self.norm_in_eps = norm_in_eps
        self.act_bits = act_bits
        self.norm_out: NormOut = norm_out
        self.norm_out_eps = norm_out_eps
        self.activations = "exact"
        self._multiplies: Literal["undecided", "kernels", "reference"] = "undecided"
        self._reason: str | None = None
        self._shapes: list[list[int]] = []
        self._multiplications: list[ops.Multiplication] = []
        #: Shares a launch with other layers on a GPU, if set (signbit.models.fused).
        self.fused: Shared | None = None

    @classmethod
    def from_spec(cls, spec: LayerSpec, variable: Mapping[str, int], dtype: torch.dtype, device: str) -> PackedLinear:
        """An empty layer of the given shape, to be filled by a loader; `dtype` is the bias's."""
        weights = []
        for place, weight_spec in enumerate(spec.weights):
            lengths = {n: variable[_tensor_name(n, place)] for n in VARIABLE if _tensor_name(n, place) in variable}
            t = {
                name: torch.empty(shape, dtype=tensor_dtype, device=device)
                for name, (tensor_dtype, shape) in weight_spec.shapes(lengths).items()
            }
            salient = None
            if weight_spec.salient_bits:
                salient = Salient(
                    t["salient_codes"], t["salient_positions"], t.get("salient_counts"), t["salient_scale"],
                    t["salient_zero"], weight_spec.salient_bits,
                )  # fmt: skip
            weights.append(
                BinaryWeight(
                    t["weight"], t["scale"], weight_spec.in_features, t.get("shift"), t.get("in_scale"),
                    t.get("in_shift"), salient,
                )
            )  # fmt: skip
        bias = torch.empty(weights[-1].out_features, dtype=dtype, device=device) if spec.bias else None
        return cls(
            weights, bias, spec.norm_in, spec.norm_in_eps, spec.act_bits, spec.norm_out, spec.norm_out_eps
        )  # fmt: skip

    def prepare(self) -> str | None:
        """Brings the weights into the order that the kernels stream; returns why the reference multiplies, or None.

        Loaders call it, and the first inference does; before torch.compile somebody has to, or each call of the compiled
        layer lays the matrix out again. Nothing that is seen from outside changes: state_dict, `weights`
        and the named tensors give the stored form, made again when they are asked for: copies, so that who wants to change
        a tensor assigns it (`layer.scale = 2 * layer.scale`), and the layer is prepared anew.
        """
        with _preparing:
            if self._multiplies != "undecided":
                return self._reason
            if offloaded(self):
                return "its weights come and go (offloaded by accelerate)"
            if self._buffers["weight"].is_meta:  # type: ignore[union-attr]
                return "its weights are on the meta device: they come later, or for each call"
            self._reason = self._prepare()
            self._multiplies = "kernels" if self._reason is None else "reference"
        if self.fused is not None:
            self.fused.join()
        return self._reason

    def _prepare(self) -> str | None:
        if self.act_bits == 1:
            return "signs of activations are left to the reference"
        bias = self._parameters["bias"]
        if bias is not None and bias.dtype not in ops.KERNEL_FLOATS:
            return f"a bias of type {bias.dtype}"
        chain = []
        for place in range(len(self._columns)):
            operands = self._operands(place)
            prepared = ops.prepare(operands, operands.signs.device)
            if isinstance(prepared, str):
                return prepared
            chain.append(prepared)
        for place, prepared in enumerate(chain):
            for name, tensor in zip(ops.Prepared._fields[:-1], prepared[:-1], strict=True):
                self.register_buffer(_prepared_name(name, place), tensor, persistent=False)
        self._shapes = [prepared.shape for prepared in chain]
        self._multiplies = "kernels"  # from here on the stored tensors are not looked at
        for place in range(len(chain)):
            for name in _TENSORS:
                del self._buffers[_tensor_name(name, place)]
        return None

    def _restore(self) -> None:
        """Back to the stored form, which is what loads, moves and casts act on."""
        if self.fused is not None:
            self.fused.part()
        with _preparing:
            chain = [self._operands(place) for place in range(len(self._columns))]
            prepared = self._multiplies == "kernels"
            if prepared:
                for place, operands in enumerate(chain):
                    for name, tensor in zip(_TENSORS, operands[:-2], strict=True):
                        self._buffers[_tensor_name(name, place)] = (
                            tensor  # register_buffer finds that the name is there
                        )
            self._multiplies, self._multiplications = "undecided", []
            if prepared:
                for place in range(len(chain)):
                    for name in ops.Prepared._fields[:-1]:
                        del self._buffers[_prepared_name(name, place)]

    def _prepared(self, place: int) -> ops.Prepared:
        tensors = [self._buffers[_prepared_name(name, place)] for name in ops.Prepared._fields[:-1]]
        return ops.Prepared._make([*tensors, self._shapes[place]])

    @property
    def prepared(self) -> tuple[ops.Prepared, ...]:
        """The chain in the kernels' order; () before `prepare`, and where the reference multiplies."""
        return tuple(map(self._prepared, range(len(self._columns)))) if self._multiplies == "kernels" else ()

    def lay_in(self, signs: Tensor, scale: Tensor) -> None:
        """Takes the prepared signs and scale of its one matrix from another place, where they stand equal."""
        self._buffers[_prepared_name("signs", 0)], self._buffers[_prepared_name("scale", 0)] = signs, scale
        self._multiplications = []

    @property
    def better_dense(self) -> tuple[str, ...]:
        """The modes in which many tokens on the CPU go by a matrix that is unpacked for the call; () if not prepared."""
        if self._multiplies != "kernels" or self._buffers[_prepared_name("signs", 0)].is_cuda:  # type: ignore[union-attr]
            return ()
        return tuple({mode for place in range(len(self._columns)) for mode in ops.better_dense(self._prepared(place))})

    def _stored_name(self, name: str) -> tuple[str, int] | None:
        """Which stored tensor of which matrix of the chain `name` is, if the layer is prepared: they are not there then."""
        stem, _, place = name.rpartition("_")
        stem, place = (stem, place) if place.isdigit() else (name, "0")
        there = self.__dict__.get("_multiplies") == "kernels" and int(place) < len(self._shapes)
        return (stem, int(place)) if there and stem in _TENSORS else None

    def __getattr__(self, name: str) -> Any:
        if (found := self._stored_name(name)) is None:
            return super().__getattr__(name)
        tensor = self._operands(found[1])[_TENSORS.index(found[0])]
        # Some are made again, others are views of what the kernels read: a change in place would be lost, or not.
        return tensor.clone() if isinstance(tensor, Tensor) else tensor

    def __setattr__(self, name: str, value: Any) -> None:
        if self._stored_name(name) is not None:
            self._restore()
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        # A copy may wake up in another process, on another device, or where there are no kernels: it gets the stored form.
        state = {**self.__dict__, "_multiplications": []}
        if self._multiplies == "kernels":
            stored: dict[str, Tensor | None] = {}
            for place in range(len(self._shapes)):
                for name, tensor in zip(_TENSORS, self._operands(place)[:-2], strict=True):
                    stored[_tensor_name(name, place)] = tensor
            state |= {
                "_buffers": stored,
                "_non_persistent_buffers_set": set(),
                "_multiplies": "undecided",
                "_shapes": [],
            }
        return state

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._multiplies == "kernels":
            for place in range(len(self._shapes)):
                for name, tensor in zip(_TENSORS, self._operands(place)[:-2], strict=True):
                    if tensor is not None:
                        destination[prefix + _tensor_name(name, place)] = tensor

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._restore()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._restore()
        # A scale is data, as the signs are: casting the model moves it but leaves its stored dtype.
        stored = {id(buffer) for buffer in self._buffers.values() if buffer is not None}

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in stored and moved.dtype is not tensor.dtype else moved

        return super()._apply(move, recurse)

    def _operands(self, place: int) -> Operands:
        if self._multiplies == "kernels":
            return self._prepared(place).stored()
        tensors: list[Any] = [self._buffers[_tensor_name(name, place)] for name in _TENSORS]
        return Operands._make([*tensors, self._salient_bits[place], self._columns[place]])

    @property
    def weights(self) -> tuple[BinaryWeight, ...]:
        """The chain as values; they share this layer's tensors until it is prepared."""
        chain = []
        for place in range(len(self._columns)):
            w = self._operands(place)
            salient = None
            if w.salient_codes is not None:
                assert w.salient_positions is not None and w.salient_scale is not None and w.salient_zero is not None
                salient = Salient(
                    w.salient_codes, w.salient_positions, w.salient_counts, w.salient_scale, w.salient_zero,
                    w.salient_bits,
                )  # fmt: skip
            chain.append(BinaryWeight(w.signs, w.scale, w.in_features, w.shift, w.in_scale, w.in_shift, salient))
        return tuple(chain)

    @property
    def spec(self) -> LayerSpec:
        """The shape of this layer, from which `from_spec` builds an empty one."""
        return LayerSpec(
            tuple(WeightSpec.of(w) for w in self.weights), self.norm_in, self.norm_in_eps, self.act_bits,
            self.norm_out, self.norm_out_eps, self.bias is not None,
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights as stored (bias apart)."""
        return sum(w.nbytes for w in self.weights)

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The product of the chain, `dtype` [N, K]; norms, activation bits and bias are no part of it."""
        first, *rest = self.weights
        product = first.to_dense(dtype)
        for weight in rest:
            product = weight.to_dense(dtype) @ product
        return product

    def forward(self, x: Tensor) -> Tensor:
        activations = {0: self.activations, 1: "sign", 8: "int8"}[self.act_bits]
        compiling = torch.compiler.is_compiling()
        if self._multiplies == "undecided" and not compiling:
            self.prepare()
        on_kernels = self._multiplies == "kernels" and x.dtype in ops.KERNEL_FLOATS
        trained = self.bias is not None and self.bias.requires_grad
        needs_grad = (torch.is_grad_enabled() and (x.requires_grad or trained)) or _in_forward_mode()
        plain = self.norm_in == self.norm_out == "none"
        if on_kernels and not needs_grad and (plain or (x.device.type == "cpu" and self.norm_out != "batch_absmax")):
            seen = compiling or type(x) is not Tensor or torch.jit.is_tracing()  # type: ignore[attr-defined]
            return self._in_one_pass(x, activations, seen)
        if self.norm_in == "rms":
            x = (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.norm_in_eps)).to(x.dtype)
        elif self.norm_in == "layer":
            x = F.layer_norm(x, (self.in_features,), eps=self.norm_in_eps)
        for place in range(len(self._columns)):
            if _in_forward_mode():
                if activations != "exact":
                    raise OptionError("forward-mode derivatives exist for exact activations only")
                x = F.linear(x, bits.dense(self._operands(place)).to(x.dtype))
            elif on_kernels:
                x = ops.prepared_linear(x, self._prepared(place), activations)
            else:
                x = ops.binary_linear(x, self._operands(place), activations)
        if self.norm_out == "layer":
            x = F.layer_norm(x, (self.out_features,), eps=self.norm_out_eps)
        elif self.norm_out == "batch_absmax":
            limit = 128 - 1e-5
            x = (x * (128 / (x.abs().max() + 1e-5))).clamp(-limit, limit) if x.numel() else x
        return x if self.bias is None else (x + self.bias).to(x.dtype)

    def _in_one_pass(self, x: Tensor, activations: str, as_op: bool) -> Tensor:
        """The kernels' own way: bias (and on the CPU norms) inside, and outside of a graph no dispatcher on the way."""
        if self.fused is not None and (part := self.fused(self, x, activations, as_op)) is not None:
            return part
        if as_op:
            for place in range(len(self._columns)):
                x = ops.prepared_linear(x, self._prepared(place), activations, *self._around(place))
            return x
        multiplications = self._multiplications
        if not multiplications or multiplications[-1].bias is not self._parameters["bias"]:
            places = range(len(self._columns))
            multiplications = [ops.multiplication(self._prepared(place), *self._around(place)) for place in places]
            self._multiplications = multiplications
        for multiply in multiplications:
            x = multiply(x, activations)
        return x

    def _around(self, place: int) -> tuple[Any, ...]:
        """Bias, norms and their eps, as far as they stand at one matrix of the chain."""
        last = place == len(self._columns) - 1
        bias = self.bias if last else None
        if self.norm_in == self.norm_out == "none":
            return (bias,)
        return (
            bias, self.norm_in if place == 0 else "none", self.norm_in_eps, self.norm_out if last else "none",
            self.norm_out_eps,
        )  # fmt: skip

    def extra_repr(self) -> str:
        per_weight = 8 * self.nbytes / (self.out_features * self.in_features)
        return f"{self.in_features} → {self.out_features}, {per_weight:.3f} bits per weight"


class BinaryLinear(nn.Module, ABC):
    """A trainable linear layer whose effective weight is binary: latent `weight` [N, K], and what a method adds.

    Laws (tests/laws): `binary().to_dense()` equals the effective weight of `forward` bit for bit in float32, and
    `pack()(x)` equals `self(x)` in evaluation to float32 rounding.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    @classmethod
    @abstractmethod
    def start(cls, weight: Tensor, bias: Tensor | None, options: Any) -> BinaryLinear:
        """The layer that training starts with in the place of a dense one: `weight` float [N, K], a method's `options`."""

    @classmethod
    def blank(cls, weight: Tensor, bias: Tensor | None, options: Any) -> BinaryLinear:
        """The same with parameters that a checkpoint will fill: `weight` may be on the meta device, and is not looked at."""
        return cls.start(weight, bias, options)

    @classmethod
    def from_packed(cls, packed: PackedLinear, weight: Tensor | None, options: Any) -> BinaryLinear:
        """The layer that goes on where `packed` ended: its signs, scales and codes, and the bias.

        `weight` float [N, K] is the matrix that was binarized, of which latents take their magnitude; None: they take
        |scale|. Raises OptionError for a packed layer that this one cannot hold.
        """
        raise OptionError(
            f"{cls.__name__} cannot go on from a packed layer; go on from the run itself (signbit finetune RUN)"
        )

    @classmethod
    def with_salient(cls, weight: Tensor, bias: Tensor | None, salient: Tensor, options: Any) -> BinaryLinear:
        """As `start`, with the salient weights where `salient` bool [N, K] is True.

        Raises OptionError for a method that has none.
        """
        raise OptionError("this method has no salient weights; leave out --masks, or use --method pbllm")

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """y = x · W̃ᵀ + bias with the binarized W̃, differentiable in the latent weight (straight-through)."""

    @abstractmethod
    def effective_weight(self) -> Tensor:
        """W̃ float [N, K], in the dtype of the latents and differentiable in them."""

    @abstractmethod
    def binary(self) -> BinaryWeight:
        """The binarized weight as a value, detached."""

    def train_parts_(self) -> None:
        """Says which of its parameters are trained: all, unless a method freezes some."""
        self.requires_grad_(True)

    def set_progress(self, done: float) -> None:
        """Tells the share of the training that is done, 0 … 1: before the first step, and after each.

        Most methods do not anneal and ignore it. One that does keeps it in a buffer that it raises in place, for compiled
        code and CUDA graphs hold that tensor; a lower share than is there, a new run's that goes on, leaves it.
        """

    def pack(self) -> PackedLinear:
        """The layer for inference; a method with norms or quantized activations overrides this."""
        return PackedLinear(self.binary(), self.bias)


class _Int8(nn.Module):
    """Row-wise abs-max int8: W ≈ diag(scale)·codes with scaleᵢ = max|Wᵢ|/127, rounded to the dtype of W.

    Both are parameters: transformers ties an embedding and a head by assigning one's parameters to the other, and the
    scale follows the model's dtype as a norm's weight does.
    """

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        super().__init__()
        if weight.dtype is not torch.int8 or weight.ndim != 2 or list(scale.shape) != [weight.shape[0]]:
            raise ShapeError(
                f"an int8 layer has int8 codes [N, K] and a scale [N], "
                f"not {weight.dtype} {list(weight.shape)} and {list(scale.shape)}"
            )
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    @staticmethod
    def quantize(dense: Tensor) -> tuple[Tensor, Tensor]:
        """Codes int8 [N, K] and scale [N] of a float matrix, the scale in its dtype; a zero row has scale 0."""
        dense = dense.detach()
        scale = (dense.float().abs().amax(dim=1) / 127).to(dense.dtype)
        divisor = torch.where(scale == 0, 1.0, scale.float())
        codes = (dense.float() / divisor[:, None]).round().clamp(-127, 127)
        return codes.to(torch.int8), scale

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scale."""
        return self.weight.numel() + self.scale.element_size() * self.scale.numel()

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """scale ∘ codes as `dtype` [N, K]."""
        return self.scale.to(dtype)[:, None] * self.weight.to(dtype)


@final
class Int8Head(_Int8):
    """An output head of int8 codes: y = x · (diag(scale)·codes)ᵀ + bias; `activations` as in PackedLinear."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight, scale)
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.activations = "exact"

    def forward(self, x: Tensor) -> Tensor:
        y = ops.int8_linear(x, self.weight, self.scale, self.activations)
        return y if self.bias is None else (y + self.bias).to(y.dtype)


@final
class Int8Embedding(_Int8):
    """A token embedding of int8 codes: row t is scaleₜ · codesₜ · multiplier, in the dtype of the scale.

    `multiplier` is the constant by which some families' embeddings scale their rows (Gemma: √hidden).
    """

    def __init__(self, weight: Tensor, scale: Tensor, multiplier: float = 1.0) -> None:
        super().__init__(weight, scale)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.multiplier = multiplier

    def forward(self, ids: Tensor) -> Tensor:
        scale = F.embedding(ids, self.scale[:, None]) * self.multiplier
        return F.embedding(ids, self.weight).to(scale.dtype) * scale


def get_activations(model: nn.Module) -> str:
    """The mode in which `model` takes activations: "exact" (a dense model too), "int8", or "mixed"."""
    modes = {module.activations for module in model.modules() if isinstance(module, (PackedLinear, Int8Head))}
    return "mixed" if len(modes) > 1 else modes.pop() if modes else "exact"


def set_activations(model: nn.Module, mode: str) -> bool:
    """Makes every PackedLinear and Int8Head of `model` take its activations as `mode`: "exact" or "int8".

    A layer with act_bits of its own keeps them. Returns whether that is now the model's mode, which it is not for
    "int8" on a model without such a layer. Raises OptionError for another mode.
    """
    if mode not in ops.ACTIVATION_MODES:
        raise OptionError(f"activations are {mode!r}; allowed: {', '.join(ops.ACTIVATION_MODES)}")
    for module in model.modules():
        if isinstance(module, (PackedLinear, Int8Head)):
            module.activations = mode
    return get_activations(model) == mode
