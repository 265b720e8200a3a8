"""Publishing a packed directory on the Hugging Face Hub."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from signbit import format as packed_format
from signbit.errors import FormatError, OptionError, SignbitError
from signbit.hub.card import HERE

#: What a card's front matter may say of a base model (https://huggingface.co/docs/hub/model-cards).
QUANTIZED = "quantized"


@dataclass(frozen=True)
class Publication:
    """What is to be published: the files of a packed directory, with the card as the hub wants it."""

    repo: str
    card: str
    files: dict[str, Path]
    """Path in the repository → file; the card, README.md, is not among them."""
    base_model: str | None

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return len(self.card.encode()) + sum(file.stat().st_size for file in self.files.values())


def prepare(out: str | Path, repo: str, base_model: str | None = None, license_id: str | None = None) -> Publication:
    """The packed directory `out` as the repository `repo`, after its headers were checked against its description.

    The card keeps its text; its front matter gets the tags of the method, the task, `license_id`, and the base model
    with `base_model_relation: quantized`. Hidden files stay out. Raises FormatError if `out` is no packed directory or
    is damaged, OptionError for names that the hub does not allow.
    """
    _check_id("repository", repo)
    if base_model is not None:
        _check_id("base model", base_model)
    out = Path(out)
    _, description = packed_format.read_description(out)
    packed_format.verify(packed_format.read_headers(packed_format.weight_files(out)), description)
    path = out / "README.md"
    card = ModelCard(
        path.read_text(encoding="utf-8") if path.exists() else f"---\n---\n# {repo}\n", ignore_metadata_errors=False
    )
    data = card.data
    method = description.settings.get("method")
    data.library_name, data.pipeline_tag = "transformers", "text-generation"
    data.tags = list(dict.fromkeys([*(data.tags or []), "signbit", "1-bit", *([method] if method else [])]))
    data.license = license_id or data.license
    if base_model is not None:
        data.base_model = base_model
    if data.base_model:
        data.base_model_relation = QUANTIZED
    card.text = card.text.replace(HERE, repo)
    files = {str(file.relative_to(out)): file for file in sorted(out.rglob("*")) if _is_public(file, out)}
    return Publication(repo, str(card), files, data.base_model)


def write(publication: Publication, folder: str | Path) -> Path:
    """Writes what `push` would upload to the new directory `folder`; raises FormatError if it exists."""
    target = Path(folder).absolute()
    if target.exists() or target.is_symlink():
        raise FormatError(f"{folder} exists; give --dry-run the name of a new directory")
    staging = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        staging.mkdir(parents=True)
        for name, file in publication.files.items():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, staging / name)
        (staging / "README.md").write_text(publication.card, encoding="utf-8")
        staging.rename(target)
    except OSError as error:
        raise FormatError(f"{folder} could not be written ({error.strerror}); nothing was changed there") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def push(publication: Publication, private: bool = False) -> str:
    """Uploads everything in one commit, and makes the repository if it is not there; returns the commit's URL.

    The token is that of `hf auth login` or of HF_TOKEN. Raises OptionError without one, or with the hub's answer where
    it refuses or cannot be reached; the same command uploads only what the hub has not got yet.
    """
    if get_token() is None:
        raise OptionError("there is no token of the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN")
    api = HfApi(library_name="signbit")
    add: list[Any] = [CommitOperationAdd("README.md", publication.card.encode())]
    add += [CommitOperationAdd(name, file) for name, file in publication.files.items()]
    with _explained(publication.repo):
        repo = api.create_repo(publication.repo, private=private, exist_ok=True).repo_id
        return str(api.create_commit(repo, add, commit_message="Packed by signbit").commit_url)


def _is_public(file: Path, out: Path) -> bool:
    parts = file.relative_to(out).parts
    return file.is_file() and parts != ("README.md",) and not any(p.startswith((".", "__pycache__")) for p in parts)


def _check_id(what: str, name: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise OptionError(f"{name!r} is no name of a {what} on the hub ({error}); NAME or USER/NAME") from None


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    try:
        yield
    except SignbitError:
        raise
    except OfflineModeIsEnabled as error:
        raise OptionError("HF_HUB_OFFLINE is set; unset it to push, or look at --dry-run FOLDER") from error
    except HfHubHTTPError as error:
        hint = "; the token must be one that may write there" if error.response.status_code in (401, 403) else ""
        raise OptionError(f"the hub refused {repo} ({_first_line(error)}){hint}") from error
    except (OSError, HTTPError) as error:
        raise OptionError(
            f"the hub could not be reached ({_first_line(error)}); the same command tries again"
        ) from error


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
