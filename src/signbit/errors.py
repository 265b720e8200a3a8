"""What signbit raises: every message says what was wrong, what is allowed and what to do next."""

from __future__ import annotations


class SignbitError(Exception):
    """Any error that signbit raises on purpose; the command line prints it without a traceback."""


class OptionError(SignbitError, ValueError):
    """An option, key or value that does not exist or does not fit (a group that does not divide K, say)."""


class ShapeError(SignbitError, ValueError):
    """Tensors whose shapes or dtypes do not describe one binarized matrix."""


class StructureError(SignbitError):
    """A model in which no repeated block of linear layers is found, or too little of it can be binarized."""


class WeightError(SignbitError):
    """A weight that cannot be binarized as it is (NaN, infinity, a scale outside the stored dtype)."""


class FormatError(SignbitError):
    """A packed directory that is damaged, incomplete, of a newer version, or in the way of a new one."""


class ExportError(SignbitError):
    """A layer, model or tokenizer that another program's form cannot hold as it is."""


class DataError(SignbitError):
    """A text or data set that is missing, empty or too short for what was asked."""


class TrainingError(SignbitError):
    """A run that cannot go on (a loss that is no number, a full disk), or a directory that holds none to go on with."""
