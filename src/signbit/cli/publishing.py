"""`signbit push`: a packed directory on the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from signbit.cli.output import byte_text, note, table
from signbit.cli.parsing import parse


@dataclass(frozen=True)
class PushOptions:
    """Publish a packed directory on the Hugging Face Hub, with card, tags and base model."""

    out: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
    """Packed directory."""
    repo: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="REPO")]
    """Repository on the hub, NAME or USER/NAME; made if it is not there."""
    base_model: str | None = None
    """Hub id of the model that was quantized; default: the one in the card."""
    license: str | None = None
    """License of the model, as the hub names it (apache-2.0, llama3.2 …); default: the one in the card."""
    private: bool = False
    """Only you can see a repository that this makes."""
    dry_run: str | None = None
    """Write what would be uploaded to this new directory, and upload nothing."""


def push(argv: Sequence[str]) -> None:
    """`signbit push`."""
    args = parse("push", argv, PushOptions)
    from signbit.hub import push as hub

    publication = hub.prepare(args.out, args.repo, args.base_model, args.license)
    sizes = [(name, byte_text(file.stat().st_size)) for name, file in publication.files.items()]
    table(None, ("file", "size"), [("README.md", byte_text(len(publication.card.encode()))), *sizes])
    if publication.base_model is None:
        note("the card names no base model; with --base-model ID the hub lists this among its quantizations")
    if args.dry_run is not None:
        print(f"{hub.write(publication, args.dry_run)} has what would be uploaded to {args.repo}")
        return
    print(f"uploaded {byte_text(publication.nbytes)}: {hub.push(publication, args.private)}")
