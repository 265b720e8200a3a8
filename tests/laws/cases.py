"""The weights that the laws run over: every term of BinaryWeight alone and together, and each method's own output."""

import torch

from signbit.methods import METHODS, Moments
from signbit.methods.base import make_options
from signbit.weight import BinaryWeight, Salient


def _salient(n, k, share, bits=8, dtype=torch.float16):
    mask = torch.rand(n, k) < share
    mask[0, 0] = True
    return Salient.from_mask(
        mask, torch.randint(0, 2**bits, (n, k)), torch.rand(n).to(dtype) * 0.01, torch.randint(0, 2**bits, (n,)), bits
    )


def make(kind, n=24, k=128, dtype=torch.float16, groups=None):
    """A random weight of one kind; float parts in `dtype`, in four groups where four divides K, unless told."""
    signs = torch.randn(n, k)

    def rand(*shape):
        return (torch.rand(*shape) + 0.1).to(dtype)

    groups = groups or next(g for g in (4, 3, 2, 1) if k % g == 0)
    if kind == "row":
        return BinaryWeight.from_signs(signs, rand(1, n, 1))
    if kind == "group":
        return BinaryWeight.from_signs(signs, rand(1, n, groups))
    if kind == "scalar":
        return BinaryWeight.from_signs(signs, rand(1, 1, 1))
    if kind == "planes":
        return BinaryWeight.from_signs(torch.randn(2, n, k), rand(2, n, groups))
    if kind == "shared_signs":
        return BinaryWeight.from_signs(signs, rand(2, n, 1), in_scale=rand(2, k))
    if kind == "in_scale":
        return BinaryWeight.from_signs(signs, rand(1, n, 1), in_scale=rand(1, k) - 0.6)
    if kind == "in_shift":
        return BinaryWeight.from_signs(signs, rand(1, 1, 1), in_scale=rand(1, k), in_shift=rand(k) - 0.5)
    if kind == "shift":
        return BinaryWeight.from_signs(signs, rand(1, n, groups), shift=rand(n, groups) - 0.6)
    if kind == "salient_offsets":
        return BinaryWeight.from_signs(signs, rand(1, n, 1), salient=_salient(n, k, 0.04, dtype=dtype))
    if kind == "salient_bitmap":
        return BinaryWeight.from_signs(
            signs, rand(1, n, groups), shift=rand(n, groups), salient=_salient(n, k, 0.4, bits=5, dtype=dtype)
        )
    if kind == "shared_parts":  # scales by all rows, an input scale and salient values by both planes
        return BinaryWeight.from_signs(
            torch.randn(2, n, k),
            rand(2, 1, groups),
            in_scale=rand(1, k) - 0.6,
            salient=_salient(n, k, 0.1, bits=7, dtype=dtype),
        )
    if kind == "all":
        return BinaryWeight.from_signs(
            torch.randn(2, n, k),
            rand(2, n, groups),
            shift=rand(n, groups) - 0.5,
            in_scale=rand(2, k),
            in_shift=rand(k) - 0.5,
            salient=_salient(n, k, 0.1, bits=3, dtype=dtype),
        )
    method, values = METHOD_CASES[kind]
    x = torch.randn(2 * k, k) * torch.rand(k)
    moments = Moments(x.T @ x / len(x), len(x), torch.randn(k, k) * 0.01)
    return make_options(METHODS, method, values).binarize(torch.randn(n, k) * 0.02, moments)


_RTN = {"gptq": False, "saliency": "magnitude"}
METHOD_CASES = {
    "absmean": ("absmean", {}),
    "absmean_g": ("absmean", {"group": 32}),
    "bitnet": ("bitnet", {}),
    "bitnet_groups": ("bitnet", {"groups": 4}),
    "bitnet_ternary": ("bitnet", {"weights": "ternary"}),
    "bitnet_transformers": ("bitnet-transformers", {}),
    "bnn": ("bnn", {}),
    "xnor": ("xnor", {}),
    "xnor_centred": ("xnor", {"center": True}),
    "bireal": ("bireal", {}),
    "irnet": ("irnet", {}),
    "irnet_published": ("irnet", {"scale": "standardised"}),
    "fda": ("fda", {}),
    "recu": ("recu", {}),
    "fbi": ("fbi", {}),
    "fbi_row": ("fbi", {"pattern": "row"}),
    "fbi_single": ("fbi", {"pattern": "single"}),
    "onebit": ("onebit", {}),
    "onebit_rank2": ("onebit", {"rank": 2}),
    "pbllm": ("pbllm", {"salient": 0.1}),
    "pbllm_rtn": ("pbllm", {**_RTN, "salient": 0.1}),
    "pb_gptq": ("pb-gptq", {"salient": 0.3, "group": 32}),
    "pbllm_g": ("pbllm", {**_RTN, "salient": 0.3, "group": 32, "salient_bits": 4}),
    "pbllm_masked": ("pbllm", {**_RTN, "salient": 0.3, "scale_over": "binarized"}),
    "pbllm_3bit": ("pbllm", {**_RTN, "low": "3bit", "salient": 0.02}),
    "pbllm_sign": ("pbllm", {**_RTN, "low": "sign"}),
    "pbllm_prune": ("pbllm", {**_RTN, "low": "prune"}),
    "pbllm_2bit": ("pbllm", {**_RTN, "low": "2bit"}),
    "pbllm_4bit": ("pbllm", {**_RTN, "low": "4bit", "salient": 0.0}),
}
TERMS = (
    "row", "group", "scalar", "planes", "shared_signs", "in_scale", "in_shift", "shift", "salient_offsets",
    "salient_bitmap", "all",
)  # fmt: skip
KINDS = (*TERMS, *METHOD_CASES)
EVERY_METHOD_HAS_A_CASE = {method for method, _ in METHOD_CASES.values()} == set(METHODS)


def bits_to_signs(operands):
    """±1 of the first plane, float32 [N, K]."""
    from signbit.bits import unpack_signs

    return unpack_signs(operands.signs[0], operands.in_features)
