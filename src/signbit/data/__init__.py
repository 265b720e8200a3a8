"""Texts: the named evaluation and calibration sets, local files, and token windows cut from them."""

from signbit.data.calibration import CalibrationOptions, check_calibration, draw_windows, self_generated
from signbit.data.sources import PROTOCOLS, SETS, Protocol, Text, TextSet, read_set, read_text_file

__all__ = [
    "PROTOCOLS",
    "SETS",
    "CalibrationOptions",
    "Protocol",
    "Text",
    "TextSet",
    "check_calibration",
    "draw_windows",
    "read_set",
    "read_text_file",
    "self_generated",
]
