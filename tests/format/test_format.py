"""The packed directory: damage, versions, a full disk, and a reader made from docs/format.md and numpy alone."""

import errno
import json
import os
import resource
import shutil
import signal
import struct
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import signbit
from signbit.errors import FormatError
from signbit.format import check_target, read_headers, tensors_sha256, weight_files, write, writer
from signbit.format.reader import headers_sha256
from signbit.linear import PackedLinear

RTN = {"gptq": False, "saliency": "magnitude"}


@pytest.fixture(params=["absmean", "pbllm"])
def packed(request, llama, tmp_path):
    settings = {"absmean": {"group": 8, "head": "int8"}, "pbllm": {"salient": 0.1, **RTN}}[request.param]
    signbit.quantize_(llama, signbit.SignbitConfig(request.param, **settings))
    return signbit.save(llama, tmp_path / "packed")


def rewrite(out, change):
    file = out / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def refuses(out, match):
    """Both ways in: signbit.load, and transformers' own."""
    with pytest.raises(FormatError, match=match):
        signbit.load(out)
    with pytest.raises(FormatError, match=match):
        AutoModelForCausalLM.from_pretrained(out)


NAME = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize("tensor", [f"{NAME}.weight", f"{NAME}.scale", "model.norm.weight"])
def test_a_missing_tensor_is_named(packed, tensor):
    rewrite(packed, lambda tensors: tensors.pop(tensor))
    refuses(packed, f"{tensor} is missing")


def test_a_missing_salient_tensor_is_named(llama, tmp_path):
    signbit.quantize_(llama, signbit.SignbitConfig("pbllm", salient=0.1, **RTN))
    out = signbit.save(llama, tmp_path / "p")
    for part in ("codes", "positions", "scale", "zero"):
        shutil.copytree(out, tmp_path / part)
        rewrite(tmp_path / part, lambda tensors, part=part: tensors.pop(f"{NAME}.salient_{part}"))
        refuses(tmp_path / part, rf"{NAME}\.salient_{part} is missing")


@pytest.mark.parametrize("tensor", [f"{NAME}.shift_9", f"{NAME}.bias", "model.layers.1.mlp.extra.weight"])
def test_an_extra_tensor_is_named(packed, tensor):
    rewrite(packed, lambda tensors: tensors.update({tensor: torch.zeros(3)}))
    refuses(packed, f"{tensor} is not one")


@pytest.mark.parametrize(
    ("tensor", "change"),
    [
        ("weight", lambda t: t[:, :, :-1].contiguous()),
        ("weight", lambda t: t.to(torch.int8)),
        ("scale", lambda t: t.float()),
    ],
)
def test_a_misshapen_tensor_is_named(packed, tensor, change):
    rewrite(packed, lambda tensors: tensors.update({f"{NAME}.{tensor}": change(tensors[f"{NAME}.{tensor}"])}))
    refuses(packed, rf"{NAME}\.{tensor} is .* config\.json asks for")


@pytest.mark.parametrize("left", [0, 4, 100, 5000, -1, -700])
def test_a_truncated_file(packed, left):
    file = packed / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:left])
    refuses(packed, "cut short|damaged|ends inside")


def test_any_flipped_bit_is_found(packed):
    file = packed / "model.safetensors"
    content = bytearray(file.read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    generator = np.random.default_rng(0)
    used_header = len(content[:header].rstrip(b" "))
    places = [
        *generator.integers(8, used_header, 12),
        *generator.integers(header, len(content), 12),
        3,
        len(content) - 1,
    ]
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(generator.integers(8))
        file.write_bytes(flipped)
        with pytest.raises(FormatError):
            AutoModelForCausalLM.from_pretrained(packed)
    file.write_bytes(content)
    AutoModelForCausalLM.from_pretrained(packed)


def edit_config(out, change):
    file = out / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda q: q.update(format_version=2), r"format_version is 2.*reads version 1: upgrade signbit"),
        (lambda q: q.update(format_version=None), "quantize the source model again"),
        (lambda q: q.update(surprise=1), "damaged.*surprise"),
        (lambda q: q["layers"][0].update(colour="red"), "damaged.*colour"),
        (lambda q: q.pop("layers"), "damaged.*layers"),
        (lambda q: q["layers"][0]["weights"][0].update(in_features=33), r"is .* config\.json asks for|divide"),
        (lambda q: q["layers"][0]["modules"].append("model.layers.9.mlp.up_proj"), "is missing"),
        (lambda q: q["layers"][0]["modules"].pop(), "mismatch|do not match|is not one"),
        (lambda q: q.update(tensors_sha256="0" * 64), "do not match tensors_sha256"),
    ],
)
def test_a_changed_config(packed, change, match):
    edit_config(packed, change)
    with pytest.raises((FormatError, RuntimeError), match=match):
        AutoModelForCausalLM.from_pretrained(packed)


def test_directories_that_are_none(tmp_path, llama_dir):
    with pytest.raises(FormatError, match="is no directory"):
        signbit.load(tmp_path / "nowhere")
    with pytest.raises(FormatError, match=r"has no config\.json"):
        signbit.load(tmp_path)
    with pytest.raises(FormatError, match="not packed by signbit; make it so with"):
        signbit.load(llama_dir)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(FormatError, match="not packed by signbit"):
        signbit.load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(FormatError, match=r"index\.json is damaged"):
        weight_files(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FormatError, match="no valid JSON"):
        signbit.load(tmp_path)


# Writing.


def listing(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_full_disk_leaves_the_old_directory(packed, llama, monkeypatch):
    before = {p.name: p.read_bytes() for p in packed.iterdir()}

    def full(*arguments, **keywords):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "write_safetensors", full)
    with pytest.raises(FormatError, match=r"No space left on device.*nothing was changed"):
        signbit.save(llama, packed, overwrite=True)
    assert {p.name: p.read_bytes() for p in packed.iterdir()} == before
    assert listing(packed.parent) == ["packed"], "no temporary directory is left"


def test_too_little_space_is_known_before_writing(packed, llama, monkeypatch):
    usage = shutil.disk_usage(packed)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(FormatError, match="bytes are needed, 1000 are free"):
        signbit.save(llama, packed, overwrite=True)
    assert listing(packed.parent) == ["packed"]


@contextmanager
def files_of_at_most(size):
    """This process may write no file above `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_file_that_the_system_cuts_off_leaves_the_old_directory(llama, tmp_path):
    out = tmp_path / "out"
    signbit.quantize_(llama, signbit.SignbitConfig())
    signbit.save(llama, out)
    with files_of_at_most(5000), pytest.raises(signbit.SignbitError, match="File too large"):
        signbit.save(llama, out, overwrite=True)
    signbit.load(out)
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []


def test_what_may_be_overwritten(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FormatError, match="is a file or a link"):
        check_target(tmp_path / "file", overwrite=True)
    (tmp_path / "home").mkdir()
    assert check_target(tmp_path / "home", overwrite=False) == tmp_path / "home", "an empty directory may be filled"
    (tmp_path / "home" / "thesis.tex").write_text("x")
    with pytest.raises(FormatError, match="exists; give another"):
        check_target(tmp_path / "home", overwrite=False)
    with pytest.raises(FormatError, match=r"holds thesis\.tex, so it is more than a model"):
        check_target(tmp_path / "home", overwrite=True)


def test_where_no_directory_can_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FormatError, match=r"file/a/out cannot be made, because .*/file is a file"):
        check_target(tmp_path / "file" / "a" / "out", overwrite=False)
    assert check_target(tmp_path / "a" / "b", overwrite=False) == tmp_path / "a" / "b"
    assert not (tmp_path / "a").exists()
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write to any directory
    with pytest.raises(FormatError, match=rf"{tmp_path} may not be written to; give another -o"):
        check_target(tmp_path / "a" / "b", overwrite=False)


def test_overwrite_deletes_no_project(tmp_path):
    project = tmp_path / "project"
    (project / "src").mkdir(parents=True)
    (project / "config.json").write_text("{}")
    for extra in ("src", None):
        with pytest.raises(FormatError, match="more than a model"):
            check_target(project, overwrite=True)
        if extra:
            (project / extra).rmdir()
    (project / "model.safetensors").write_bytes(b"")
    assert check_target(project, overwrite=True) == project


def test_stale_temporary_directories_of_dead_processes_are_removed(tmp_path):
    (tmp_path / ".out.partial-999999999").mkdir()
    write(tmp_path / "out", {"a": torch.ones(3)}, {"config.json": b"{}"})
    assert listing(tmp_path) == ["out"]


def test_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SHARD_BYTES", 100)
    tensors = {f"t{i}": torch.arange(20, dtype=torch.float32) + i for i in range(5)}
    out = write(tmp_path / "out", tensors, {"config.json": b"{}"})
    files = weight_files(out)
    assert len(files) == 5
    headers = read_headers(files)
    assert set(headers) == set(tensors)
    assert headers_sha256(headers) == tensors_sha256(tensors)
    files[2].unlink()
    with pytest.raises(FormatError, match="is missing, though the index names it"):
        weight_files(out)


# A reader of docs/format.md that knows numpy and nothing of signbit.


def read_with_numpy(directory):
    config = json.loads(Path(directory, "config.json").read_text())["quantization_config"]
    raw = Path(directory, "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    kinds = {"U8": np.uint8, "I8": np.int8, "F16": np.float16, "F32": np.float32}

    def tensor(name):
        entry = header[name]
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        return np.frombuffer(raw[begin:end], kinds[entry["dtype"]]).reshape(entry["shape"])

    matrices = {}
    for entry in config["layers"]:
        spec = entry["weights"][0]
        n, k = spec["out_features"], spec["in_features"]
        for name in entry["modules"]:
            signs = (
                np.unpackbits(tensor(f"{name}.weight"), axis=-1, bitorder="little")[..., :k].astype(np.float32) * 2 - 1
            )
            scale = tensor(f"{name}.scale").astype(np.float32)
            groups = scale.shape[2]
            dense = np.zeros((n, k), np.float32)
            for plane in range(scale.shape[0]):
                sign = signs[min(plane, signs.shape[0] - 1)].reshape(n, groups, -1)
                dense += (sign * scale[plane][:, :, None]).reshape(n, k)
            if spec.get("shift"):
                dense += np.repeat(tensor(f"{name}.shift").astype(np.float32), k // groups, axis=1)
            if bits := spec.get("salient_bits", 0):
                positions = tensor(f"{name}.salient_positions")
                if spec["salient_positions"] == "bitmap":
                    mask = np.unpackbits(positions, axis=-1, bitorder="little")[:, :k].astype(bool)
                    rows, columns = np.nonzero(mask)
                else:
                    counts = tensor(f"{name}.salient_counts")
                    block = np.repeat(np.arange(counts.size), counts.reshape(-1))
                    rows, columns = block // counts.shape[1], block % counts.shape[1] * 256 + positions
                stream = np.unpackbits(tensor(f"{name}.salient_codes"), bitorder="little")[: bits * len(rows)]
                codes = (stream.reshape(-1, bits).astype(np.int64) << np.arange(bits)).sum(1)
                zero = tensor(f"{name}.salient_zero").astype(np.int64)[rows]
                dense[rows, columns] = tensor(f"{name}.salient_scale").astype(np.float32)[rows] * (codes - zero)
            matrices[name] = dense
    for name, spec in config["int8"].items():
        if spec["tied_to"] is None:
            matrices[name] = tensor(f"{name}.scale").astype(np.float32)[:, None] * tensor(f"{name}.weight")
    return matrices


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("absmean", {"group": 8, "head": "int8"}),
        ("pbllm", {"salient": 0.05, **RTN}),
        ("pbllm", {"salient": 0.4, "salient_bits": 3, "group": 8, **RTN}),
        ("pbllm", {"salient": 0.1, "low": "3bit", **RTN}),
        ("pbllm", {"low": "prune", "salient": 0.5, **RTN}),
    ],
)
def test_numpy_and_the_format_page_read_the_same_matrices(llama, tmp_path, method, options):
    signbit.quantize_(llama, signbit.SignbitConfig(method, **options))
    out = signbit.save(llama, tmp_path / "packed")
    matrices = read_with_numpy(out)
    layers = {n: m for n, m in llama.named_modules() if isinstance(m, PackedLinear)}
    assert set(layers) <= set(matrices)
    for name, matrix in matrices.items():
        want = llama.get_submodule(name).to_dense().numpy()
        np.testing.assert_allclose(matrix, want, rtol=0, atol=1e-7 * np.abs(want).max())


def test_the_digest_of_the_format_page(packed):
    """docs/format.md's recipe, without signbit's code."""
    import hashlib

    raw = (packed / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__")
    digest = hashlib.sha256()
    for name in sorted(header):
        entry = header[name]
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        digest.update(f"{name}\0{entry['dtype']}\0{','.join(map(str, entry['shape']))}\0".encode() + raw[begin:end])
    config = json.loads((packed / "config.json").read_text())
    assert config["quantization_config"]["tensors_sha256"] == digest.hexdigest()
