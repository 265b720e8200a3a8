"""The version of signbit, stated once."""

VERSION = "0.1.0"
