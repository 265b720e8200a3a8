"""Texts: the named evaluation and calibration sets, local files, token windows cut from them, and blocks to train on."""

from signbit.data.blocks import Blocks, SourceUse
from signbit.data.calibration import CalibrationOptions, check_calibration, draw_windows, self_generated
from signbit.data.corpus import Source, TrainingData, parse_source
from signbit.data.generated import self_generate
from signbit.data.sources import PROTOCOLS, SETS, Protocol, Text, TextSet, read_set, read_text_file
from signbit.data.tokenfile import TokenFile, read_token_file, token_file

__all__ = [
    "PROTOCOLS",
    "SETS",
    "Blocks",
    "CalibrationOptions",
    "Protocol",
    "Source",
    "SourceUse",
    "Text",
    "TextSet",
    "TokenFile",
    "TrainingData",
    "check_calibration",
    "draw_windows",
    "parse_source",
    "read_set",
    "read_text_file",
    "read_token_file",
    "self_generate",
    "self_generated",
    "token_file",
]
