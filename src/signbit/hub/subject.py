"""A model that is measured: loaded when something of it is not known yet, and what of it is kept."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from signbit.data import PROTOCOLS, read_set, read_text_file
from signbit.errors import FormatError, OptionError, SignbitError
from signbit.evaluate.facts import Facts
from signbit.evaluate.kept import KeptWindows, digest, drop_parts, keep, recall
from signbit.evaluate.machines import forced_kernels, here, joined, what
from signbit.evaluate.perplexity import TextOptions
from signbit.evaluate.size import dense_size, measure_size
from signbit.evaluate.speed import Speed, SpeedOptions, machine, speed
from signbit.hub.distill import is_run, load_latent
from signbit.hub.load import base_of, is_packed, load_any, load_config, load_tokenizer
from signbit.hub.stream import source_digests
from signbit.linear import set_activations
from signbit.version import VERSION


def model_digests(model: str) -> dict[str, str]:
    """What identifies a model: its files, and for an adapter those of the model that it stands beside."""
    base = base_of(model)
    beside = {} if base is None else {f"base/{file}": found for file, found in model_digests(base).items()}
    return {**source_digests(model), **beside}


def named(text: str) -> tuple[str, str]:
    """Name and place of NAME=PLACE; of a place alone, the name is that of its last folder."""
    before, equals, after = text.partition("=")
    if equals and before and after and "/" not in before and not Path(text).exists():
        return before, after
    return Path(text.rstrip("/")).name, text


@dataclass(frozen=True)
class Where:
    """Where and how a model runs."""

    device: str = "cpu"
    dtype: str = "auto"
    activations: str = "exact"


class Subject:
    """One model under measurement; `again` measures also what is kept."""

    def __init__(self, name: str, place: str, where: Where, again: bool = False) -> None:
        self.name, self.place, self.where, self.again = name, place, where, again
        self.answered: set[str] = (
            set()
        )  # the texts to which it was asked `again` already, as a teacher of several models
        self._measured_on: list[dict[str, Any]] = []

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 over the digests of its files, as `signbit eval --json` has it."""
        _ = self.config  # which says what is wrong with a place
        return hashlib.sha256(repr(sorted(model_digests(self.place).items())).encode()).hexdigest()

    @functools.cached_property
    def config(self) -> Any:
        """Its configuration, of an adapter that of the model that it stands beside."""
        return load_config(base_of(self.place) or self.place, packed=True)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return load_tokenizer(self.place)

    @functools.cached_property
    def model(self) -> Any:
        """It itself, loaded when it is first asked for; `release` lets it go."""
        model = load_any(self.place, self.where.dtype, self.where.device)
        set_activations(model, self.where.activations)
        return model

    def release(self) -> None:
        """Lets the model go."""
        self.__dict__.pop("model", None)

    def _key(self, kind: str, protocol: dict[str, Any]) -> dict[str, Any]:
        return {"what": kind, "signbit": VERSION, **asdict(self.where), **forced_kernels(), **protocol}

    def record(self, name: str, machine: dict[str, str]) -> None:
        """Notes the machine on which the result `name` was found."""
        self._measured_on.append({"what": [name], **machine})

    @property
    def measured_on(self) -> tuple[dict[str, Any], ...]:
        """The machines on which was found what was measured or recalled so far."""
        return joined(self._measured_on)

    def keep(self, kind: str, protocol: dict[str, Any], found: dict[str, Any]) -> None:
        """Keeps what was found here under a protocol (JSON values)."""
        machine = here(self.where.device)
        keep(self.sha256, self._key(kind, protocol), found, machine)
        self.record(what(kind, found), machine)

    def recall(self, kind: str, protocol: dict[str, Any]) -> dict[str, Any] | None:
        """What is kept of this model under a protocol (JSON values); None where there is nothing.

        With `again` there is nothing, and what a killed measurement left goes.
        """
        key = self._key(kind, protocol)
        if self.again:
            drop_parts(self.sha256, key)
            return None
        if (kept := recall(self.sha256, key)) is None:
            return None
        found, machine = kept
        self.record(what(kind, found), machine)
        return dict(found)

    def windows(self, protocol: dict[str, Any], place: int = 0) -> KeptWindows:
        """What a killed measurement of a perplexity found here; `place` is that of this process among several."""
        return KeptWindows(self.sha256, self._key("perplexity", protocol), here(self.where.device), place)

    def known(self, kind: str, protocol: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What is kept of this model under a protocol (JSON values), else what `measure` finds, which is then kept."""
        if (kept := self.recall(kind, protocol)) is not None:
            return kept
        found = measure()
        self.keep(kind, protocol, found)
        return found

    def facts(self) -> Facts:
        """Its size, how it was made, the bits of each packed layer, and what measured it; nothing is loaded for it."""
        facts = Facts(self.name, self.place, self.sha256, measured_on=self.measured_on)
        folder = base_of(self.place) or self.place
        if not Path(folder).is_dir():
            return facts
        if not is_packed(folder):
            return replace(facts, size=dense_size(folder).to_dict())
        size = measure_size(folder)
        options = ", ".join(f"{key}={value}" for key, value in size.settings.get("options", {}).items())
        method = size.settings.get("method", "unknown")
        layers = tuple(
            {
                "name": layer.name, "weights": layer.out_features * layer.in_features, "nbytes": layer.nbytes,
                "bits_per_weight": layer.bits_per_weight,
            }
            for layer in size.layers
        )  # fmt: skip
        summary = {key: value for key, value in size.to_dict().items() if key not in ("layers", "settings")}
        return replace(
            facts, made_by=f"{method} ({options})", command=_command(folder), layers=layers,
            size={**summary, "kinds": [asdict(kind) for kind in size.kinds()]},
        )  # fmt: skip

    def speed(self, options: SpeedOptions) -> dict[str, Any]:
        """Speed and memory, measured in a process of its own unless they are known for this machine."""
        protocol = {**asdict(options), "machine": machine(self.where.device)}
        return self.known("speed", protocol, lambda: _speed_alone(self.place, self.where, options).to_dict())


def perplexity_protocol(
    name: str, data_dir: str | None, max_windows: int | None, options: TextOptions | None = None
) -> dict[str, Any]:
    """What decides a perplexity but the model and where it runs: a local text by its content, the hub's by its name."""
    protocol: dict[str, Any] = {"protocol": name, "max_windows": max_windows, **asdict(options or TextOptions())}
    if name not in PROTOCOLS:
        protocol["text"] = digest(read_text_file(name).documents)
    elif data_dir is not None:
        protocol["text"] = digest(read_set(PROTOCOLS[name], data_dir).documents)
    return protocol


def measured_as(found: dict[str, Any], protocol: dict[str, Any]) -> bool:
    """Whether a perplexity (JSON values) was measured under a `perplexity_protocol`.

    A file is known by its text; a named set by its name, and by its text where both were local. An older signbit wrote
    no protocol beside the label: what stands before the label's additions decides, and how many windows it names.
    """
    name, limit, asked = protocol["protocol"], protocol["max_windows"], found.get("asked")
    if asked is None:
        label, *additions = found["protocol"].split(", ")
        cut = [words.split(" of ")[0] for words in additions if words.startswith("first ")]
        return label == Path(name).name and cut == ([] if limit is None else [f"first {limit}"])
    if asked["protocol"] != name and {asked["protocol"], name} & PROTOCOLS.keys():
        return False
    return all(asked[key] == protocol[key] for key in (asked.keys() & protocol.keys()) - {"protocol"})


def tokenizer_place(model: str) -> str:
    """Where the tokenizer of a model or a run lies."""
    return str(Path(model) / "tokenizer") if is_run(model) else model


def load_to_compare(model: str) -> Any:
    """A packed or full-precision model, or the student of a run with its latent weights; float32, on the CPU."""
    if is_run(model):
        return load_latent(model)
    return load_any(model, "float32")


def _command(folder: str) -> str | None:
    """The command that made a packed directory, out of its model card."""
    try:
        card = (Path(folder) / "README.md").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    found = re.search(r"^Made with:\n\n```\n(.*?)\n```$", card, re.MULTILINE | re.DOTALL)
    return found[1] if found else None


def _speed_alone(place: str, where: Where, options: SpeedOptions) -> Speed:
    asked = json.dumps([place, asdict(where), asdict(options)])
    done = subprocess.run(
        [sys.executable, "-m", "signbit.hub.subject"], input=asked, capture_output=True, text=True, check=False
    )
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or ["no word of why"])[-1]
        raise FormatError(f"the process that timed {place} ended with status {done.returncode}: {last}") from None
    if "error" in answer:
        raise OptionError(answer["error"])
    return Speed(**answer)


def _main() -> None:
    """Answers what `_speed_alone` asks, on a line of JSON."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    place, where, options = json.load(sys.stdin)
    subject = Subject("", place, Where(**where))
    try:
        found = speed(lambda: subject.model, SpeedOptions(**options), where["device"]).to_dict()
    except SignbitError as error:
        found = {"error": str(error)}
    print(json.dumps(found))


if __name__ == "__main__":
    _main()
