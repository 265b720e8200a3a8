"""Calibration windows: drawn as the published loaders draw them, from files without `datasets`."""

import json
import random
from types import SimpleNamespace

import pytest
import torch

from signbit.data import SETS, CalibrationOptions, check_calibration, draw_windows, self_generated, writing
from signbit.data.writing import continued
from signbit.errors import DataError, OptionError


def words(n, seed=0):
    generator = random.Random(seed)
    return " ".join(f"w{generator.randint(0, 60)}" for _ in range(n))


@pytest.fixture
def documents(tmp_path):
    path = tmp_path / "text.jsonl"
    rows = [words(n, n) for n in (10, 300, 20, 120, 64, 65)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path, rows


def test_c4_is_drawn_as_published(documents, tokenizer, tmp_path):
    _, rows = documents
    (tmp_path / "c4").mkdir()
    (tmp_path / "c4" / "c4-train.part.jsonl").write_bytes(documents[0].read_bytes())
    windows, source = draw_windows(tokenizer, CalibrationOptions("c4", 20, 64, seed=3), tmp_path)
    assert source.endswith("c4-train.part.jsonl")
    generator, want = random.Random(3), []
    while len(want) < 20:
        ids = tokenizer(rows[generator.randint(0, 5)]).input_ids
        if len(ids) > 64:
            start = generator.randint(0, len(ids) - 64 - 1)
            want.append(ids[start : start + 64])
    assert windows.tolist() == want


@pytest.mark.parametrize("name", ["wikitext2", "ptb"])
def test_running_text_is_drawn_as_published(name, tokenizer, tmp_path):
    lines = [words(30, seed) for seed in range(12)]
    file = tmp_path / SETS[name].local[0].rpartition("/")[2]
    file.write_text("\n".join(lines) + "\n")
    windows, _ = draw_windows(tokenizer, CalibrationOptions(name, 5, 32, seed=1), tmp_path)
    joined = " ".join(line + "\n" for line in lines) if name == "wikitext2" else " ".join(lines)
    ids = tokenizer(joined).input_ids
    generator = random.Random(1)
    starts = [generator.randint(0, len(ids) - 32 - 1) for _ in range(5)]
    assert windows.tolist() == [ids[start : start + 32] for start in starts]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "short.jsonl"])
def test_files_of_ones_own(kind, documents, tokenizer, tmp_path):
    path = tmp_path / f"own.{kind}"
    if kind == "txt":
        path.write_text(words(500))
    elif kind == "parquet":
        arrow = pytest.importorskip("pyarrow", reason="pyarrow reads parquet")
        from pyarrow.parquet import write_table

        write_table(arrow.table({"text": documents[1], "other": list(range(6))}), path)
    else:
        rows = documents[1] if kind == "jsonl" else [words(9, seed) for seed in range(30)]
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    check_calibration(CalibrationOptions(str(path)))
    windows, source = draw_windows(tokenizer, CalibrationOptions(str(path), 7, 48))
    assert windows.shape == (7, 48)
    assert windows.dtype is torch.int64
    assert source == str(path)
    if kind == "short.jsonl":  # no document is as long as a window: they are joined
        assert "\n\n".join(["w1", "w2"]).split() == ["w1", "w2"]
        joined = tokenizer("\n\n".join(json.loads(line)["text"] for line in path.read_text().splitlines())).input_ids
        text = ",".join(map(str, joined))
        assert all(",".join(map(str, window)) in text for window in windows.tolist())


def test_a_seed_is_a_draw(documents, tokenizer):
    path = str(documents[0])
    one, again, other = (draw_windows(tokenizer, CalibrationOptions(path, 8, 48, seed))[0] for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_text_shorter_than_one_window(tokenizer, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text(words(40))
    with pytest.raises(
        DataError, match=r"short\.txt: 40 tokens are not more than one window of 64; give more text or a small"
    ):
        draw_windows(tokenizer, CalibrationOptions(str(path), 8, 64))
    (tmp_path / "c4").mkdir()
    (tmp_path / "c4" / "c4-train.part.jsonl").write_text(json.dumps({"text": words(40)}) + "\n")
    with pytest.raises(DataError, match="no document is longer than one window of 64 tokens"):
        draw_windows(tokenizer, CalibrationOptions("c4", 8, 64), tmp_path)


def test_bad_sources(tokenizer, tmp_path):
    with pytest.raises(
        DataError,
        match=r"--calibration c5: no such file; the sets with names are c4, wikitext2, ptb, wikitext-103-v1 and self",
    ):
        check_calibration(CalibrationOptions("c5"))
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "w1"}\n{"txet": "w2"}\n')
    with pytest.raises(DataError, match=r"broken\.jsonl, line 2"):
        check_calibration(CalibrationOptions(str(broken)))
    with pytest.raises(DataError, match="has no file for ptb"):
        check_calibration(CalibrationOptions("ptb"), tmp_path)
    with pytest.raises(OptionError, match="--samples is 0"):
        CalibrationOptions("c4", samples=0)
    with pytest.raises(OptionError, match="--sequence-length is 1"):
        CalibrationOptions("c4", sequence_length=1)
    with pytest.raises(OptionError, match=r"--sequence-length is 200, but the model has 128 positions"):
        draw_windows(tokenizer, CalibrationOptions("c4", sequence_length=200), tmp_path, limit=128)


def test_a_parquet_file_without_text(tokenizer, tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="pyarrow reads parquet")
    from pyarrow.parquet import write_table

    write_table(arrow.table({"words": ["w1"]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="has no column text; it has words"):
        check_calibration(CalibrationOptions(str(tmp_path / "other.parquet")))
    (tmp_path / "no.parquet").write_text("w1 w2")
    with pytest.raises(DataError, match="is no parquet file that can be read"):
        check_calibration(CalibrationOptions(str(tmp_path / "no.parquet")))


def test_what_the_model_writes(llama):
    seen = []
    options = CalibrationOptions("self", samples=5, sequence_length=20, seed=2)
    windows = self_generated(llama, options, batch=2, progress=lambda done, total: seen.append((done, total)))
    assert windows.shape == (5, 20)
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert torch.equal(windows, self_generated(llama, options, batch=2))
    other = CalibrationOptions("self", samples=5, sequence_length=20, seed=3)
    assert not torch.equal(windows, self_generated(llama, other, batch=2))
    # The first tokens after the random one are the likeliest.
    for row in windows:
        logits = llama(row[None, :4]).logits[0]
        assert row[1:4].tolist() == logits[:3].argmax(-1).tolist()
    assert len({row[0].item() for row in windows}) > 1


def test_the_published_data_are_there(shared, tokenizer):
    check_calibration(CalibrationOptions("c4"), shared / "data")
    check_calibration(CalibrationOptions("wikitext2"), shared / "data")


@pytest.mark.parametrize(
    ("name", "content"),
    [("null.jsonl", b'{"text": null}\n'), ("number.jsonl", b'{"text": 3}\n'), ("broken.jsonl.gz", b"no gzip")],
)
def test_files_that_hold_no_text_are_named(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        check_calibration(CalibrationOptions(str(tmp_path / name)))


def test_local_files_need_no_datasets(documents, tokenizer, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    assert draw_windows(tokenizer, CalibrationOptions(str(documents[0]), 3, 48))[0].shape == (3, 48)


class Constant(torch.nn.Module):
    """Says the same of every next token; without a cache."""

    def __init__(self, chances):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(chances).log().clamp_min(-1e4))

    def forward(self, input_ids, past_key_values, use_cache):
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1), past_key_values=None)


def test_tokens_are_drawn_as_often_as_they_are_likely(monkeypatch):
    chances = [0.0, 0.5, 0.0, 0.3, 0.15, 0.05, 0.0]
    rows = torch.stack(continued(Constant(chances), torch.zeros(2000, 1, dtype=torch.long), 2, 12, torch.Generator()))
    assert (rows[:, 1:3] == 1).all(), "the likeliest"
    drawn = rows[:, 3:].flatten()
    for token, chance in enumerate(chances):
        off = 5 * (chance * (1 - chance) / len(drawn)) ** 0.5
        assert abs(float((drawn == token).float().mean()) - chance) <= off, token
    assert len({tuple(row) for row in rows[:, 3:].tolist()}) > 1000, "rows are drawn apart"
    monkeypatch.setattr(torch, "rand", lambda *size, generator: torch.zeros(*size))
    (row,) = continued(Constant(chances), torch.zeros(1, 1, dtype=torch.long), 2, 6, torch.Generator())
    assert row.tolist() == [0, 1, 1, 1, 1, 1], "the first that can be"


def test_a_cache_with_room_changes_nothing(llama, monkeypatch):
    first = torch.arange(3, 7)[:, None]
    with torch.no_grad():
        rows = continued(llama, first, 3, 30, torch.Generator().manual_seed(1))
        monkeypatch.setattr(writing, "_with_room", lambda cache, length: cache)
        assert all(map(torch.equal, rows, continued(llama, first, 3, 30, torch.Generator().manual_seed(1))))


def test_there_is_room(llama):
    with torch.no_grad():
        cache = llama(torch.arange(3, 7)[:, None], use_cache=True).past_key_values
        writing._with_room(cache, 9)
        held = cache.layers[0].keys
        cache = llama(torch.arange(3, 7)[:, None], past_key_values=cache, use_cache=True).past_key_values
    assert cache.get_seq_length() == 2 and cache.layers[0].keys.untyped_storage().nbytes() >= 9 * held.numel() * 4
    assert cache.layers[0].keys.stride() != cache.layers[0].keys.contiguous().stride(), "a part of something longer"
