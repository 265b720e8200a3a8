"""Texts: named evaluation and calibration sets, local files, windows and blocks of tokens, and what a teacher answers."""

from signbit.data.blocks import Blocks, SourceUse
from signbit.data.calibration import CalibrationOptions, check_calibration, draw_windows, self_generated
from signbit.data.corpus import Source, TrainingData, parse_source
from signbit.data.generated import self_generate
from signbit.data.sources import PROTOCOLS, SETS, Protocol, Text, TextSet, read_set, read_text_file
from signbit.data.teacher_logits import (
    TaughtBlocks,
    TeacherLogits,
    check_logits_name,
    read_teacher_logits,
    write_teacher_logits,
)
from signbit.data.tokenfile import TokenFile, read_token_file, token_file

__all__ = [
    "PROTOCOLS",
    "SETS",
    "Blocks",
    "CalibrationOptions",
    "Protocol",
    "Source",
    "SourceUse",
    "TaughtBlocks",
    "TeacherLogits",
    "Text",
    "TextSet",
    "TokenFile",
    "TrainingData",
    "check_calibration",
    "check_logits_name",
    "draw_windows",
    "parse_source",
    "read_set",
    "read_teacher_logits",
    "read_text_file",
    "read_token_file",
    "self_generate",
    "self_generated",
    "token_file",
    "write_teacher_logits",
]
