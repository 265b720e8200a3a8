"""Packed directories in the forms of other programs: one file a form, and for GGUF one for each of its parts.

`run.export` is what `signbit export` calls; `dense`, `bitnet` and `gguf` write. What a form cannot hold is refused.
"""
