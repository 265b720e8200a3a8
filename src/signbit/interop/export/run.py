"""From a packed directory to another program's form: `signbit export`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from signbit import format as packed_format
from signbit.errors import OptionError
from signbit.interop.export import bitnet, dense, gguf
from signbit.interop.export.request import ExportRequest, Progress
from signbit.interop.export.source import Packed

#: The options that belong to one form alone.
_OF_ONE_FORM = {"dtype": ("dense", "bitnet"), "type": ("gguf",), "head": ("gguf",), "approximate_type": ("gguf",)}


def export(
    source: str | Path,
    out: str | Path,
    request: ExportRequest,
    overwrite: bool = False,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> Path:
    """Writes the packed directory `source` to the directory `out` in the form `request.format`, complete or not at all.

    One layer is in memory at a time. `progress` is called with (stage, done, in all, name), `note` with lines for the user.
    Raises FormatError if `source` is damaged or `out` cannot be written; ExportError, with the layer and what would hold it,
    for what the form cannot hold; OptionError for options that do not fit.
    """
    for name, forms in _OF_ONE_FORM.items():
        default = ExportRequest.__dataclass_fields__[name].default
        if request.format not in forms and getattr(request, name) != default:
            raise OptionError(f"--{name.replace('_', '-')} belongs to --format {' and '.join(forms)}; leave it out")
    target = packed_format.check_target(out, overwrite)
    if target.resolve() in (Path(source).resolve(), *Path(source).resolve().parents):
        raise OptionError(f"the directory to write is the source {source} itself, or holds it; give another -o")
    write = {"dense": dense.write, "gguf": gguf.write, "bitnet": bitnet.write}[request.format]
    return write(
        Packed(source), target, request, overwrite, progress or (lambda *_: None), note or (lambda _line: None)
    )
