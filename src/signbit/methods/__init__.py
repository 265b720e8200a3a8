"""The methods by name: one file a paper, each with its options, its solver and, where it trains, its layer."""

from __future__ import annotations

from signbit.methods.absmean import AbsmeanLinear, AbsmeanOptions
from signbit.methods.base import Method
from signbit.methods.bitnet import (
    BitnetLinear,
    BitnetOptions,
    BitnetTransformersLinear,
    BitnetTransformersOptions,
)
from signbit.methods.classic import (
    BirealLinear,
    BirealOptions,
    BnnOptions,
    ClassicLinear,
    FdaOptions,
    IrnetOptions,
    RecuOptions,
    XnorOptions,
)
from signbit.methods.fbi import FbiLinear, FbiOptions
from signbit.methods.gptq import Moments
from signbit.methods.onebit import OnebitLinear, OnebitOptions
from signbit.methods.pbllm import PbGptqOptions, PbllmLinear, PbllmOptions

#: Every method; a new one is one file beside these and one line here.
METHODS: dict[str, Method] = {
    "absmean": Method(AbsmeanOptions, layer=AbsmeanLinear),
    "bitnet": Method(BitnetOptions, layer=BitnetLinear),
    "bitnet-transformers": Method(BitnetTransformersOptions, layer=BitnetTransformersLinear),
    "bnn": Method(BnnOptions, layer=ClassicLinear),
    "xnor": Method(XnorOptions, layer=ClassicLinear),
    "bireal": Method(BirealOptions, layer=BirealLinear),
    "irnet": Method(IrnetOptions, layer=ClassicLinear),
    "fda": Method(FdaOptions, layer=ClassicLinear),
    "recu": Method(RecuOptions, layer=ClassicLinear),
    "fbi": Method(FbiOptions, layer=FbiLinear),
    "onebit": Method(OnebitOptions, layer=OnebitLinear),
    "pbllm": Method(PbllmOptions, layer=PbllmLinear),
    "pb-gptq": Method(PbGptqOptions),
}

__all__ = [
    "METHODS",
    "AbsmeanLinear",
    "AbsmeanOptions",
    "BirealLinear",
    "BirealOptions",
    "BitnetLinear",
    "BitnetOptions",
    "BitnetTransformersLinear",
    "BitnetTransformersOptions",
    "BnnOptions",
    "ClassicLinear",
    "FbiLinear",
    "FbiOptions",
    "FdaOptions",
    "IrnetOptions",
    "Method",
    "Moments",
    "OnebitLinear",
    "OnebitOptions",
    "PbGptqOptions",
    "PbllmLinear",
    "PbllmOptions",
    "RecuOptions",
    "XnorOptions",
]
