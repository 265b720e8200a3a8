"""PB-LLM's dense saves: matrices of a few values, and the mask files that tell which of them are binary."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from signbit.errors import FormatError
from signbit.interop.checkpoint import Checkpoint, Layer
from signbit.interop.files import load_pickle
from signbit.interop.form import Rest, empty_model, require, transformers_config
from signbit.linear import PackedLinear
from signbit.models import find_structure
from signbit.weight import BinaryWeight, Salient

#: Bits of the significand to which a stored value is right (float32: less what the arithmetic before it lost).
_PRECISION = {torch.float16: 11, torch.float32: 22}
#: The narrowest group of columns that is looked for: in two columns there are never more than two values.
_NARROWEST = 8
#: Above this share, values half way between two others are a method's levels and no accidents of sign(0) = 0.
_ACCIDENTS = 0.01


def layer(weight: Tensor, mask: Tensor, bias: Tensor | None = None) -> Layer:
    """W = (s·S + μ) where `mask` is True, step·(code − zero) elsewhere: a dense `weight` taken apart again.

    `weight` float [N, K]; `mask` bool [N, K], True for what was binarized. s and μ [N, G] are half the difference and half
    the sum of the two values that the binarized weights of a row and a group have, G the fewest groups of columns for which
    there are two; step, code and zero are the coarsest 8-bit codes of a row that give its salient values, to the rounding
    of `weight`'s dtype. Reads what the methods xnor, sign and prune leave. Source: PB-LLM (arXiv 2310.00034);
    its code's gptq_pb/gptq.py, low_quant.py and high_quant.py. Raises FormatError if `weight` is not of this form.
    """
    require(
        mask.dtype is torch.bool and mask.shape == weight.shape,
        f"the mask is {mask.dtype} {list(mask.shape)}; bool {list(weight.shape)}, as the weight, is expected",
    )
    require(
        weight.dtype in _PRECISION,
        f"weight is {weight.dtype}; float16 or float32 is expected (of 8-bit codes, bfloat16 has rounded some into others)",
    )
    w = weight.float()
    scale, shift, zeros = _two_values(w, mask, _PRECISION[weight.dtype])
    groups = scale.shape[1]
    positive = (w.reshape(len(w), groups, -1) >= shift[:, :, None]).reshape(w.shape)
    salient = None
    if not bool(mask.all()):
        salient = _codes(torch.where(mask, 0.0, w), ~mask, _PRECISION[weight.dtype])
    binary = BinaryWeight.from_signs(positive, scale[None], shift=shift if bool(shift.any()) else None, salient=salient)
    return Layer(PackedLinear(binary, bias), zeros)  # less the mean, these are 0


def _two_values(w: Tensor, mask: Tensor, precision: int) -> tuple[Tensor, Tensor, int]:
    """s and μ float32 [N, G] for the fewest groups, and how many values lie on μ itself."""
    rows, columns = w.shape
    for groups in (g for g in range(1, max(1, columns // _NARROWEST) + 1) if columns % g == 0):
        grouped, inside = w.reshape(rows, groups, -1), mask.reshape(rows, groups, -1)
        low = torch.where(inside, grouped, torch.inf).amin(dim=-1, keepdim=True)
        high = torch.where(inside, grouped, -torch.inf).amax(dim=-1, keepdim=True)
        none = low > high  # all salient
        low, high = torch.where(none, 0.0, low), torch.where(none, 0.0, high)
        between = inside & (grouped != low) & (grouped != high)
        middle = (low + high) / 2
        if bool((between & ((grouped - middle).abs() > 2**-precision * torch.maximum(low.abs(), high.abs()))).any()):
            continue
        zeros = int(between.sum())
        if zeros > _ACCIDENTS * int(mask.sum()):
            continue
        return ((high - low) / 2)[:, :, 0], middle[:, :, 0], zeros
    raise FormatError(
        "its binarized weights have more than two values in every group of columns. The methods xnor, sign and prune are "
        "read; 2bit, 4bit and no are not, and the mask must be that of this very run (True: binarized)"
    )


def _codes(values: Tensor, salient: Tensor, precision: int) -> Salient:
    """The coarsest grid step·(code − zero) of each row, with code and zero in 0 … 255, that holds `values` float [N, K].

    The largest value of a row is n steps for some n from 1 to 255: the first n for which there is a step that gives all
    values of the row, as they were rounded to `precision` bits.
    """
    rows = len(values)
    ordered = values.sort(dim=1).values
    place = torch.cat([torch.zeros(rows, 1, dtype=torch.int64), (ordered.diff(dim=1) != 0).cumsum(dim=1)], dim=1)
    distinct = torch.zeros(rows, int(place.max()) + 1).scatter_(1, place, ordered)  # what is left over stays 0
    require(
        distinct.shape[1] <= 257, "a row has more than 256 salient values, which are no 8-bit codes; is this the mask?"
    )
    largest = distinct.abs().amax(dim=1).double()
    step = torch.where(largest == 0, 1.0, torch.nan).double()
    for n in range(1, 256):
        left = step.isnan().nonzero()[:, 0]
        if not len(left):
            break
        step[left] = _step(distinct[left].double(), largest[left, None] / n, precision)
    bad = int(step.isnan().sum())
    require(
        not bad, f"the salient weights of {bad} rows are not on a grid of 8-bit codes; is this the mask of this run?"
    )
    whole = (values.double() / step[:, None]).round()
    zero = -whole.amin(dim=1).clamp_max(0)
    codes = (whole + zero[:, None]).to(torch.int32)
    bits = max(1, int(codes.max()).bit_length())
    return Salient.from_mask(salient, codes, step.float(), zero, bits)


def _step(v: Tensor, start: Tensor, precision: int) -> Tensor:
    """Float64 [n]: a step near `start` [n, 1] of which all `v` [n, m] are whole numbers from 0 to 255 apart, or NaN.

    A value rounded to v lies within half a unit of v's last place, below a power of two within a quarter: that bounds the
    step from both sides.
    """
    whole = (v / start).round()
    fraction, exponent = torch.frexp(v.abs())
    half = torch.ldexp(torch.full_like(v, 1 - 2**-16), exponent - precision - 1)  # a tie could be rounded the other way
    below = torch.where(fraction == 0.5, half / 2, half)
    count = whole.abs().clamp_min(1)
    least = torch.where(whole == 0, 0.0, (v.abs() - below) / count).amax(dim=1)
    most = torch.where(whole == 0, torch.inf, (v.abs() + half) / count).amin(dim=1)
    wide = whole.amax(dim=1).clamp_min(0) - whole.amin(dim=1).clamp_max(0) > 255
    lost = ((whole == 0) & (v != 0)).any(dim=1)
    return torch.where(wide | lost | (least > most), torch.nan, (least + most) / 2)


def open_dense(
    folder: Path, values: dict[str, Any], tensors: Mapping[str, Tensor], masks: str | Path | None
) -> Checkpoint:
    """The dense save in `folder` with the mask files in `masks`; raises FormatError without them, with the reason."""
    if masks is None:
        raise FormatError(
            f"{folder} is a dense model. If PB-LLM saved it, its mask files are needed (gptq_pb/outputs/mask/*.pkl): which "
            "weights are binary and which are 8-bit stands in them alone; give --masks DIR. If it is in full precision: "
            f"signbit quantize {folder} -o OUT"
        )
    config = transformers_config(values, folder)
    targets = [t.name for t in find_structure(empty_model(config, folder)).targets]
    layers, taken = {}, set()
    for name, file in _mask_files(Path(masks), targets).items():
        own = {part: f"{name}.{part}" for part in ("weight", "bias") if f"{name}.{part}" in tensors}
        require("weight" in own, f"the tensor {name}.weight is missing; copy or download the checkpoint again")
        layers[name] = partial(_read, name, file, tensors, own)
        taken |= set(own.values())
    return Checkpoint(
        form="PB-LLM, dense with masks",
        config=config,
        layers=layers,
        rest=Rest((name for name in tensors if name not in taken), tensors.__getitem__),
        tokenizer={"pretrained_model_name_or_path": str(folder)},
        may_be_dense=lambda name: True,  # --minlayer, --maxlayer, --quant_only
        zero="they lay on the mean of their group, and take the larger of its two values here",
    )


def _read(name: str, file: Path, tensors: Mapping[str, Tensor], own: Mapping[str, str]) -> Layer:
    mask = load_pickle(file)
    require(isinstance(mask, Tensor), f"{file} holds {type(mask).__name__}, not the mask of a layer")
    bias = tensors[own["bias"]] if "bias" in own else None
    try:
        return layer(tensors[own["weight"]], mask, bias)
    except FormatError as error:
        raise FormatError(f"{name} with {file.name}: {error}") from error


def _mask_files(folder: Path, names: list[str]) -> dict[str, Path]:
    """Layer → its mask file, mask_FRACTION_MODEL+LAYER.pkl; raises FormatError for a file of no layer, or two of one."""
    require(
        not folder.is_file(), f"--masks {folder} is a file; give the directory of all masks: --masks {folder.parent}"
    )
    files = sorted(folder.glob("*.pkl"))
    require(bool(files), f"--masks {folder} holds no mask file (*.pkl); give PB-LLM's gptq_pb/outputs/mask")
    found: dict[str, Path] = {}
    for file in files:
        fitting = [name for name in names if file.stem.endswith(name)]
        require(
            bool(fitting),
            f"{file} ends with the name of no layer of this model (such as {names[0]}.pkl); "
            "give a directory with the masks of this model alone",
        )
        name = max(fitting, key=len)
        require(
            name not in found,
            f"{file.name} and {found.get(name, file).name} are both masks of {name}; give a directory with those of one run",
        )
        found[name] = file
    return {name: found[name] for name in names if name in found}
