"""What is said of an extra that is missing, wherever signbit came from."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from signbit import extras

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        ({}, "pip install 'signbit[gguf]'"),
        ({"url": "file:///HERE", "dir_info": {"editable": True}}, "pip install -e 'HERE[gguf]'"),
        ({"url": "file:///HERE", "dir_info": {}}, "pip install 'HERE[gguf]'"),
        ({"url": "file:///nowhere/at/all", "dir_info": {"editable": True}}, "pip install 'signbit[gguf]'"),
        (
            {"url": "https://example.org/s.git", "vcs_info": {"vcs": "git", "commit_id": "1a2b"}},
            "pip install 'signbit[gguf] @ git+https://example.org/s.git@1a2b'",
        ),
        (
            {"url": "file:///tmp/signbit-1.whl", "archive_info": {}},
            "pip install 'signbit[gguf] @ file:///tmp/signbit-1.whl'",
        ),
    ],
)
def test_the_command_that_fits_an_installation(origin, command, tmp_path, monkeypatch):
    here = tmp_path / "a checkout"
    here.mkdir()
    if "HERE" in origin.get("url", ""):
        origin = {**origin, "url": here.as_uri()}
    monkeypatch.setattr(extras, "_origin", lambda: origin)
    assert extras.install("gguf") == command.replace("HERE", str(here))


@pytest.mark.slow
def test_pip_understands_it_in_this_installation():
    words = shlex.split(extras.install("gguf"))
    done = subprocess.run(
        [sys.executable, "-m", *words, "--dry-run", "--no-deps", "--no-index", "--no-build-isolation", "-q"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_one_place_makes_the_sentence_and_the_extras_are_there():
    declared, asked = (ROOT / "pyproject.toml").read_text(), set()
    for file in (ROOT / "src").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        asked |= set(re.findall(r"install\('(\w+)'\)", text))
        assert file.name == "extras.py" or "signbit[" not in text, f"{file} says itself how an extra is installed"
    assert asked == {"gguf", "serve", "lora", "plot", "eval"}
    assert all(f"\n{extra} = [" in declared for extra in asked)


def test_a_missing_package_says_it(monkeypatch, tmp_path):
    from signbit.errors import SignbitError
    from signbit.interop.convert import convert

    (tmp_path / "file").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SignbitError) as raised:
        convert(str(tmp_path / "file"), tmp_path / "out")
    assert str(raised.value).endswith(extras.install("gguf"))
