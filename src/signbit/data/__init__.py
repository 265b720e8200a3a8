"""Texts: the named evaluation sets, local files, and token windows cut from them."""

from signbit.data.sources import PROTOCOLS, Protocol, Text, read_protocol, read_text_file

__all__ = ["PROTOCOLS", "Protocol", "Text", "read_protocol", "read_text_file"]
