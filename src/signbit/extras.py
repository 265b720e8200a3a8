"""The optional parts of signbit, and how they come into this installation."""

from __future__ import annotations

import json
import shlex
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

_SOURCE = Path(__file__).resolve().parents[2]


def install(extra: str) -> str:
    """The command that installs an extra of signbit from where this signbit came: PyPI, a checkout, a repository.

    Where an installation came from stands in its direct_url.json (PEP 610).
    """
    return f"pip install {_wanted(extra, _origin())}"


def _origin() -> dict[str, Any]:
    """direct_url.json; nothing of an installation from an index."""
    try:
        written = distribution("signbit").read_text("direct_url.json")
    except PackageNotFoundError:  # a source tree that is on the path
        return (
            {"url": _SOURCE.as_uri(), "dir_info": {"editable": True}} if (_SOURCE / "pyproject.toml").exists() else {}
        )
    origin: dict[str, Any] = json.loads(written) if written else {}
    return origin


def _wanted(extra: str, origin: dict[str, Any]) -> str:
    url = origin.get("url", "")
    if "dir_info" in origin:
        folder = Path(url2pathname(urlparse(url).path))
        if folder.is_dir():
            return f"{'-e ' * bool(origin['dir_info'].get('editable'))}{shlex.quote(f'{folder}[{extra}]')}"
    elif "vcs_info" in origin:
        version = origin["vcs_info"]
        return shlex.quote(f"signbit[{extra}] @ {version['vcs']}+{url}@{version['commit_id']}")
    elif url:
        return shlex.quote(f"signbit[{extra}] @ {url}")
    return f"'signbit[{extra}]'"
