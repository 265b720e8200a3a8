"""Training text as packed token blocks: what is read, tokenized once, drawn, held out and written by the model."""

import contextlib
import gzip
import json
import lzma
import os
import pickle
import random
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from signbit.data import (
    Blocks,
    Source,
    TrainingData,
    parse_source,
    read_set,
    read_text_file,
    read_token_file,
    self_generate,
    token_file,
)
from signbit.data import corpus as corpus_module
from signbit.data import tokenfile as tokenfile_module
from signbit.data.corpus import find_corpus
from signbit.data.sources import SETS
from signbit.errors import DataError, OptionError, WeightError

END = 2  # the id of </s>


def words(n, seed=0):
    generator = random.Random(seed)
    return " ".join(f"w{generator.randint(0, 60)}" for _ in range(n))


def numbered(tokens):
    """Text whose token t is t modulo 61, as a word, so that a block tells where it is from."""
    return " ".join(f"w{t % 61}" for t in range(tokens))


def ids_of(file):
    return file.open().tolist()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "tokens"


@pytest.fixture
def made(tokenizer, tmp_path, folder):
    """Makes a file of tokens of a text."""

    def make(text, name="text.txt"):
        (tmp_path / name).write_text(text)
        return token_file(tokenizer, Source(str(tmp_path / name)), folder)

    return make


class Mute:
    """A tokenizer that must not be asked for ids."""

    def __init__(self, inner):
        self._inner = inner

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def __call__(self, *args, **named):
        raise AssertionError("text is tokenized")


def mute(tokenizer):
    return Mute(tokenizer)


# --- sources


def test_words_of_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("corpus.txt.xz", "a.jsonl", "b.parquet", "c=2.txt", "d.txt=3"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "x.txt").write_text("w1")
    assert parse_source("corpus.txt.xz") == Source("corpus.txt.xz", 1.0)
    assert parse_source("a.jsonl=0.7") == Source("a.jsonl", 0.7)
    assert parse_source("c4=2") == Source("c4", 2.0)
    assert parse_source("some") == Source("some", 1.0)
    assert parse_source("hub:allenai/c4:en:train:text=1e-3") == Source("hub:allenai/c4:en:train:text", 0.001)
    assert parse_source("c=2.txt") == Source("c=2.txt", 1.0), "a file's own equals sign is no weight"
    assert parse_source("c=2.txt=5") == Source("c=2.txt", 5.0)
    data = TrainingData.parse(["wikitext2", "a.jsonl"])
    assert data.weights == (1.0, 1.0)
    assert TrainingData.parse(["a.jsonl=0.7", "b.parquet=0.3"]).weights == (0.7, 0.3)
    with pytest.raises(DataError, match=r"b\.parquet has no weight, but other sources have one"):
        TrainingData.parse(["a.jsonl=0.7", "b.parquet"])
    with pytest.raises(DataError, match=r"a\.jsonl is given twice"):
        TrainingData.parse(["a.jsonl=1", "a.jsonl=2"])
    with pytest.raises(DataError, match="no training text is given"):
        TrainingData.parse([])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("c5", r"c5: no such file; a source is a file \(\.txt, .*a set \(c4, wikitext2, ptb, .*\), or hub:DATASET"),
        ("gone.tokens", r"gone\.tokens: no such file; a source is"),
        ("c4=much", "c4=much: much is no weight, and there is no file of this name"),
        ("c4=0", r"c4 has the weight 0\.0; a weight is a positive number"),
        ("c4=nan", "c4 has the weight nan"),
        ("c4=inf", "c4 has the weight inf"),
        ("hub:allenai/c4:train:text", "a source of the hub is hub:DATASET:CONFIGURATION:SPLIT:COLUMN"),
        ("hub:allenai/c4:en:train:", "a source of the hub is"),
        ("notes.md", r"notes\.md is no file of a kind that is read; a source is"),
        ("empty", r"empty holds no text to train on .*files that are read end in \.txt, "),
    ],
)
def test_words_that_are_no_source(word, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.md").write_text("w1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.md").write_text("w1")
    with pytest.raises(DataError, match=message):
        parse_source(word)


# --- reading


def write_documents(path, documents):
    """A file of documents, in the way that its name asks for."""
    if path.name.endswith(".parquet"):
        arrow = pytest.importorskip("pyarrow", reason="pyarrow reads parquet")
        from pyarrow.parquet import write_table

        write_table(arrow.table({"other": list(range(len(documents))), "text": documents}), path)
        return
    if ".txt" in path.name:
        content = "\n\n\n".join(documents) + "\n"
    else:
        content = "".join(json.dumps({"text": document}) + "\n" for document in documents)
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wt", encoding="utf-8") as stream:
        stream.write(content)


@pytest.mark.parametrize(
    "name",
    ["a.txt", "a.txt.gz", "a.txt.xz", "a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.json.gz", "a.json.xz", "a.parquet"],
)
def test_each_kind_of_file_gives_the_same_tokens(name, tokenizer, tmp_path, folder):
    documents = ["w1 w2\n\nw3", "w4", "w5 w6"]
    write_documents(tmp_path / name, documents)
    source = parse_source(str(tmp_path / name))
    progress = []
    file = token_file(tokenizer, source, folder, progress=lambda *done: progress.append(done))
    assert ids_of(file) == [4, 5, 6, END, 7, END, 8, 9, END]
    assert len(progress) == 1
    assert 0 < progress[0][0] <= progress[0][1] == (tmp_path / name).stat().st_size
    assert (file.documents, file.tokens, file.boundary, file.dtype) == (3, 9, END, "uint16")
    assert file.source == str(tmp_path / name)
    assert [piece.text for piece in find_corpus(source).pieces()] == documents
    if name.endswith(("gz", "xz")):
        joined = "\n\n\n".join(documents) + "\n"
        expected = (joined,) if ".txt" in name else tuple(documents)
        assert read_text_file(tmp_path / name).documents == expected


def test_a_directory_is_its_files_by_name(tokenizer, tmp_path, folder, monkeypatch):
    some = tmp_path / "some"
    (some / "deeper").mkdir(parents=True)
    write_documents(some / "b.txt", ["w2"])
    write_documents(some / "a.jsonl", ["w1"])
    write_documents(some / "c.txt.xz", ["w3"])
    (some / "notes.md").write_text("w9")
    write_documents(some / "deeper" / "d.txt", ["w9"])
    listed = type(some).iterdir
    monkeypatch.setattr(type(some), "iterdir", lambda self: iter(sorted(listed(self), reverse=True)))
    progress = []
    file = token_file(tokenizer, parse_source(str(some)), folder, progress=lambda *done: progress.append(done))
    assert ids_of(file) == [4, END, 5, END, 6, END]
    size = sum((some / name).stat().st_size for name in ("a.jsonl", "b.txt", "c.txt.xz"))
    assert progress == [(size, size)]


@pytest.mark.parametrize(
    ("text", "documents"),
    [
        ("w1\n\nw2\n", ["w1\n\nw2"]),
        ("w1\n\n\nw2", ["w1", "w2"]),
        ("w1\n\n\n\n\nw2\n\n\n\n", ["w1", "w2"]),
        ("\n\n\nw1\r\n\r\n\r\nw2", ["w1", "w2"]),
        ("w1\n \n\nw2\u2028\n", ["w1\n \n\nw2\u2028"]),
    ],
)
def test_two_empty_lines_divide_documents(text, documents, tmp_path):
    (tmp_path / "a.txt").write_bytes(text.encode())
    pieces = list(find_corpus(Source(str(tmp_path / "a.txt"))).pieces())
    assert [piece.text for piece in pieces] == documents
    assert all(piece.last for piece in pieces)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_long_documents_are_cut_at_line_ends(name, tokenizer, tmp_path, folder, monkeypatch):
    monkeypatch.setattr(corpus_module, "PIECE_CHARACTERS", 100)
    lines = "\n".join(words(n, n) for n in (5, 30, 1, 0, 7, 22)) + f"\n{words(80)} {'x' * 150}"
    documents = [lines, "w1", words(200)]
    write_documents(tmp_path / name, documents)
    source = Source(str(tmp_path / name))
    pieces = list(find_corpus(source).pieces())
    texts, whole = [], ""
    for piece in pieces:
        assert 0 < len(piece.text) <= 100
        whole += piece.text
        if piece.last:
            texts.append(whole)
            whole = ""
    assert texts == documents
    assert not whole
    cuts = [piece.text for piece in pieces if not piece.last]
    assert any(cut.endswith("\n") for cut in cuts)
    assert not any(cut[-1] == "w" for cut in cuts), "a word is cut only where it is longer than a piece"
    expected = []
    for document in documents:
        expected += [*tokenizer(document.replace("x" * 150, "")).input_ids, END]
    got = ids_of(token_file(tokenizer, source, folder))
    # The one word that is longer than a piece is unknown in each of its parts.
    assert [i for i in got if i] == [i for i in expected if i]


def test_a_long_text_is_not_held_in_memory(tokenizer, tmp_path, folder, monkeypatch):
    monkeypatch.setattr(corpus_module, "PIECE_CHARACTERS", 1000)
    monkeypatch.setattr(tokenfile_module, "_BATCH_CHARACTERS", 5000)
    (tmp_path / "a.txt").write_text("\n".join(words(10, n) for n in range(3000)))
    seen = []

    class Watching(Mute):
        def __call__(self, texts, **named):
            seen.append(sum(map(len, texts)))
            return self._inner(texts, **named)

    progress = []
    source = Source(str(tmp_path / "a.txt"))
    file = token_file(Watching(tokenizer), source, folder, progress=lambda *done: progress.append(done))
    assert max(seen) <= 6000
    assert (file.documents, file.tokens) == (1, 30001)
    size = (tmp_path / "a.txt").stat().st_size
    assert progress[0][0] < 20_000 < size, "the first tokens are made before the rest is read"
    assert progress == sorted(progress)
    assert progress[-1] == (size, size)
    assert len(progress) == len(seen)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"w1 caf\xe9 w2", r"a\.txt is not UTF-8 text \(invalid continuation byte, byte 0xe9\); convert it"),
        ("a.jsonl", b'{"text": "w1"}\n{"txt": "w2"}\n', r"a\.jsonl, line 2: not a JSON object with a text"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl, line 1: .*surrogates not allowed"),
        ("a.txt", b" \n\n\n\n", r"a\.txt holds no text"),
        ("a.jsonl", b"", r"a\.jsonl holds no text"),
        ("a.txt.xz", b"w1", r"a\.txt\.xz is damaged, or not packed as its name says"),
        ("a.txt.xz", lzma.compress(words(5000).encode())[:-60], r"a\.txt\.xz is damaged"),
        ("a.txt.gz", b"w1", r"a\.txt\.gz is damaged"),
        ("a.txt.gz", gzip.compress(words(5000).encode())[:-60], r"a\.txt\.gz is damaged"),
        ("a.jsonl.gz", gzip.compress(b"")[:10] + b"\x07" * 30, r"a\.jsonl\.gz is damaged"),
        ("a.parquet", b"w1", r"a\.parquet is no parquet file"),
    ],
    ids=str.split("latin without-text half-a-character blank empty no-xz cut-xz no-gz cut-gz broken-gz no-parquet"),
)
def test_texts_that_cannot_be_read(name, content, message, tokenizer, tmp_path, folder):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="pyarrow reads parquet")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        token_file(tokenizer, Source(str(tmp_path / name)), folder)
    assert not list(folder.glob("*")), "nothing is left"
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        read_text_file(tmp_path / name)


def test_a_text_that_is_gone(tokenizer, tmp_path, folder):
    with pytest.raises(DataError, match=r"gone\.txt: no such file"):
        token_file(tokenizer, Source(str(tmp_path / "gone.txt")), folder)


def test_named_sets_lie_in_data_dir(tokenizer, tmp_path, folder):
    (tmp_path / "wiki.train.raw").write_text(" = w1 = \n \nw2 w3\n")
    progress = []
    file = token_file(tokenizer, Source("wikitext2"), folder, tmp_path, lambda *done: progress.append(done))
    assert progress == [(17, 17)]
    joined = " ".join(read_set(SETS["wikitext2"], tmp_path).documents)
    assert ids_of(file) == [*tokenizer(joined).input_ids, END], "rows are joined, not divided"
    assert file.source == str(tmp_path / "wiki.train.raw")
    write_documents(tmp_path / "c4-train.jsonl", ["w1", "w2 w3"])
    (tmp_path / "c4").mkdir()
    (tmp_path / "c4-train.jsonl").rename(tmp_path / "c4" / "c4-train.jsonl")
    assert ids_of(token_file(tokenizer, Source("c4"), folder, tmp_path)) == [4, END, 5, 6, END]
    with pytest.raises(DataError, match="has no file for ptb"):
        token_file(tokenizer, Source("ptb"), folder, tmp_path)


def test_hub_data_sets(tokenizer, tmp_path, folder, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="hub data sets come through datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    own = tmp_path / "own"
    own.mkdir()
    (own / "train.jsonl").write_text('{"words": "w1 w2"}\n{"words": null}\n{"words": "w3"}\n')
    source = parse_source(f"hub:{own}::train:words")
    progress = []
    file = token_file(tokenizer, source, folder, progress=lambda *done: progress.append(done))
    assert ids_of(file) == [4, 5, END, 6, END]
    assert progress == [(3, None)], "the set does not say how many rows it has"
    assert token_file(mute(tokenizer), source, folder) == file
    with pytest.raises(DataError, match="has no column text; it has words"):
        token_file(tokenizer, parse_source(f"hub:{own}::train:text"), folder)
    with pytest.raises(DataError, match=r"could not be loaded from the hub \(.*\); give local files"):
        token_file(tokenizer, parse_source(f"hub:{own}::test:words"), folder)
    (own / "train.jsonl").write_text('{"words": "w5"}\n')
    assert ids_of(token_file(tokenizer, source, folder)) == [8, END]


def test_named_sets_of_the_hub(tokenizer, folder, monkeypatch):
    import sys
    from types import SimpleNamespace

    class Rows(list):
        column_names = ("text",)
        _fingerprint = "0"

    rows = Rows({"text": f"w{i % 61}"} for i in range(36720))
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *args, **named: rows))
    joined = token_file(tokenizer, Source("wikitext2"), folder)
    assert (joined.documents, joined.tokens) == (1, 36719), "as many rows as the set has, and one boundary"
    apart = token_file(tokenizer, Source("c4"), folder)
    assert (apart.documents, apart.tokens) == (36720, 2 * 36720), "another set of the same fingerprint is another file"
    assert joined.source == "Salesforce/wikitext (wikitext-2-raw-v1, train)"


def test_files_need_no_datasets(made, monkeypatch, tokenizer, folder):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    assert made("w1").tokens == 2
    with pytest.raises(
        DataError, match=r"hub:a/b::train:text from the hub needs the package datasets.*give local files"
    ):
        token_file(tokenizer, Source("hub:a/b::train:text"), folder)


# --- tokens


def test_documents_end_with_a_boundary(tokenizer, tmp_path, folder):
    import copy

    write_documents(tmp_path / "a.jsonl", ["w1", " ", "</s>", "w2"])
    source = Source(str(tmp_path / "a.jsonl"))
    assert [piece.text for piece in find_corpus(source).pieces()] == ["w1", "</s>", "w2"], "blank ones are none"
    assert ids_of(token_file(tokenizer, source, folder)) == [4, END, END, END, 5, END]
    begins = copy.deepcopy(tokenizer)
    begins.eos_token = None
    file = token_file(begins, source, folder)
    assert (file.boundary, ids_of(file)) == (1, [4, 1, END, 1, 5, 1])
    begins.bos_token = None
    file = token_file(begins, source, folder)
    assert (file.boundary, ids_of(file)) == (None, [4, END, 5])
    assert len(list(folder.glob("*.tokens"))) == 3


def test_the_json_beside_it(made):
    file = made("w1 w2")
    values = json.loads(file.path.with_name(f"{file.path.name}.json").read_text())
    assert values["source"].endswith("text.txt")
    assert (values["documents"], values["tokens"], values["boundary"], values["dtype"]) == (1, 3, END, "uint16")
    assert len(values["tokenizer"]) == 64
    assert file.path.read_bytes() == np.array([4, 5, END], "<u2").tobytes()
    assert read_token_file(file.path) == file


def test_wide_vocabularies_take_four_bytes(tmp_path, folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def tokenizer_of(highest):
        inner = Tokenizer(models.WordLevel({"<unk>": 0, "w1": 1, "w2": highest}, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")

    (tmp_path / "a.txt").write_text("w2 w1")
    for highest, dtype, size in ((65535, "uint16", 4), (65536, "uint32", 8)):
        file = token_file(tokenizer_of(highest), Source(str(tmp_path / "a.txt")), folder)
        assert (file.dtype, file.path.stat().st_size, ids_of(file)) == (dtype, size, [highest, 1])


def test_text_is_tokenized_once(tokenizer, tmp_path, folder):
    path = tmp_path / "a.txt"
    path.write_text("w1 w2")
    file = token_file(tokenizer, Source(str(path)), folder)
    assert token_file(mute(tokenizer), Source(str(path)), folder) == file
    # What a caller did to the tokenizer before makes no difference to the ids, and none here.
    tokenizer("w1 w2 w3", truncation=True, max_length=2)
    assert token_file(mute(tokenizer), Source(str(path)), folder) == file
    tokenizer("w1")
    # The name is that of the content: another one is another source of the same tokens.
    path.rename(tmp_path / "b.txt")
    renamed = token_file(mute(tokenizer), Source(str(tmp_path / "b.txt")), folder)
    assert renamed.path == file.path
    assert renamed.source == str(tmp_path / "b.txt")


def test_what_changes_the_tokens_makes_them_anew(tokenizer, tmp_path, folder, monkeypatch):
    import copy

    path = tmp_path / "a.txt"
    path.write_text("w1 w2")
    first = token_file(tokenizer, Source(str(path)), folder)
    stamp = path.stat()
    path.write_text("w1 w3")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    second = token_file(tokenizer, Source(str(path)), folder)
    assert ids_of(second) == [4, 6, END]
    assert ids_of(first) == [4, 5, END]
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["w3x"])
    assert token_file(other, Source(str(path)), folder).path != second.path
    monkeypatch.setattr(tokenfile_module, "VERSION", 2)
    assert token_file(tokenizer, Source(str(path)), folder).path != second.path
    # The same bytes mean other documents in a file of another kind.
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "w1"}\n')
    rows = token_file(tokenizer, Source(str(path)), folder)
    path.rename(tmp_path / "c.txt")
    assert ids_of(rows) == [4, END]
    assert ids_of(token_file(tokenizer, Source(str(tmp_path / "c.txt")), folder)) == [0, 0, END]


class Killed(BaseException):
    """What no handler of the code under test knows."""


def test_interrupted_writing_leaves_nothing(tokenizer, tmp_path, folder, monkeypatch):
    monkeypatch.setattr(tokenfile_module, "_BATCH_CHARACTERS", 100)
    path = tmp_path / "a.txt"
    path.write_text("\n\n\n".join(words(30, n) for n in range(20)))

    def stop(done, size):
        if done > size // 2:
            raise Killed

    with pytest.raises(Killed):
        token_file(tokenizer, Source(str(path)), folder, progress=stop)
    assert not list(folder.iterdir())
    file = token_file(tokenizer, Source(str(path)), folder)
    assert file.tokens == 20 * 31
    whole = file.path.read_bytes()
    # Killed between the two renames, or the file was cut: both are made anew.
    description = file.path.with_name(f"{file.path.name}.json")
    description.unlink()
    with pytest.raises(DataError, match=r"\.tokens\.json: No such file.*with a \.json beside it"):
        read_token_file(file.path)
    assert token_file(tokenizer, Source(str(path)), folder) == file
    assert description.exists()
    file.path.write_bytes(whole[:-2])
    with pytest.raises(DataError, match="has 1238 bytes instead of 1240: it is not complete"):
        read_token_file(file.path)
    assert token_file(tokenizer, Source(str(path)), folder) == file
    assert file.path.read_bytes() == whole
    description.write_text("{}")
    with pytest.raises(DataError, match="does not describe a file of tokens"):
        read_token_file(file.path)
    description.write_text('{"format": 99}')
    with pytest.raises(DataError, match="has format 99, this signbit reads 1"):
        read_token_file(file.path)
    assert sorted(p.name for p in folder.iterdir()) == sorted([file.path.name, description.name])


def test_what_a_killed_process_left_is_swept(made, folder):
    import socket

    folder.mkdir()
    stale = folder / f".{'0' * 64}.tokens.partial-{socket.gethostname()}-999999999"
    elsewhere = folder / f".{'0' * 64}.tokens.partial-another-999999999"
    at_work = folder / f".{'0' * 64}.tokens.partial-{socket.gethostname()}-{os.getppid()}"
    for file in (stale, elsewhere, at_work):
        file.write_bytes(b"")
    made("w1")
    assert [file.exists() for file in (stale, elsewhere, at_work)] == [not os.path.exists("/proc/self"), True, True]


def test_a_folder_that_cannot_be_written(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("w1")
    with pytest.raises(DataError, match=r"a\.txt/x/.*\.tokens cannot be written \(Not a directory\); give another"):
        token_file(tokenizer, Source(str(tmp_path / "a.txt")), tmp_path / "a.txt" / "x")


def test_a_file_of_tokens_is_a_source(tokenizer, made, tmp_path):
    import copy

    file = made("w1 w2")
    source = parse_source(str(file.path))
    assert token_file(mute(tokenizer), source, tmp_path / "unused") == file
    assert not (tmp_path / "unused").exists()
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["w3x"])
    with pytest.raises(DataError, match="holds tokens of another tokenizer than the model's"):
        token_file(other, source, tmp_path / "unused")
    text = tmp_path / "wiki.train.tokens"
    text.write_text("w1")
    with pytest.raises(DataError, match=r"wiki\.train\.tokens\.json: No such file"):
        token_file(tokenizer, parse_source(str(text)), tmp_path / "unused")


def test_a_real_tokenizer(stories, shared, folder, tmp_path):
    from transformers import AutoTokenizer

    real = AutoTokenizer.from_pretrained(stories)
    stories_text = (shared / "data" / "tinystories" / "tinystories_train_first_2MiB.txt").read_text()[:20000]
    documents = [text.strip() for text in stories_text.split("<|endoftext|>")]
    write_documents(tmp_path / "a.txt.xz", documents)
    file = token_file(real, Source(str(tmp_path / "a.txt.xz")), folder)
    ids = ids_of(file)
    assert file.documents == ids.count(real.eos_token_id) == len(documents)
    first = ids[: ids.index(real.eos_token_id)]
    assert real.decode(first).strip() == documents[0]


# --- blocks


def blocks_of(data):
    return [tuple(item["input_ids"].tolist()) for item in (data[i] for i in range(len(data)))]


def cut(file, length):
    ids = ids_of(file)
    return [tuple(ids[i : i + length]) for i in range(0, len(ids) - length + 1, length)]


def test_a_pass_is_every_block_once(made):
    file = made(numbered(103))  # 104 tokens with the boundary: 13 blocks of 8
    data = Blocks([file], 8)
    item = data[0]["input_ids"]
    assert (item.shape, item.dtype) == ((8,), torch.int64)
    got = blocks_of(data)
    assert len(data) == 13
    assert sorted(got) == sorted(cut(file, 8))
    assert got != cut(file, 8), "they are shuffled"
    # The last, incomplete block is dropped.
    assert len(Blocks([file], 10)) == 10
    with pytest.raises(IndexError):
        data[13]
    assert torch.equal(data[-1]["input_ids"], data[12]["input_ids"])
    assert len(list(data)) == 13


def test_each_pass_has_its_own_order(made):
    file = made(numbered(159))
    got = blocks_of(Blocks([file], 8, count=50))
    passes = [got[:20], got[20:40]]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(cut(file, 8))
    assert passes[0] != passes[1]
    assert len(set(got[40:])) == 10
    (use,) = Blocks([file], 8, count=50).uses
    assert (use.tokens, use.blocks, use.drawn, use.passes) == (160, 20, 50, 2.5)


def test_a_seed_is_an_order_and_any_item_can_be_asked_for(made):
    files = [made(numbered(159), "a.txt"), made(words(500, 1), "b.txt")]
    options = {"count": 90, "weights": [0.7, 0.3]}
    data = Blocks(files, 8, seed=5, **options)
    got = blocks_of(data)
    fresh = Blocks(files, 8, seed=5, **options)
    for i in random.Random(0).sample(range(90), 90):
        assert tuple(fresh[i]["input_ids"].tolist()) == got[i]
    assert blocks_of(Blocks(files, 8, seed=6, **options)) != got
    # What is asked for does not depend on how long the run is.
    assert blocks_of(Blocks(files, 8, seed=5, count=40, weights=[0.7, 0.3])) == got[:40]


def test_the_order_is_that_of_every_version(made):
    """Golden: a run that goes on under a newer signbit or numpy must see the same data."""
    files = [made(numbered(159), "a.txt"), made(words(159, 1), "b.txt")]
    data = Blocks(files, 8, count=8, weights=[3, 1], seed=7, validation_blocks=2)
    assert [data.locate(i) for i in range(8)] == [(1, 2), (0, 11), (0, 10), (0, 16), (1, 10), (0, 9), (0, 15), (0, 1)]


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1, 1, 1), (0.5, 0.2, 0.2, 0.1), (1e-6, 1), (3.3, 5.1, 0.01)])
def test_shares_follow_the_weights_all_along(weights, made):
    files = [made(words(100 + i, i), f"{i}.txt") for i in range(len(weights))]
    data = Blocks(files, 8, count=2000, weights=weights)
    drawn = Counter()
    for i in range(2000):
        drawn[data.locate(i)[0]] += 1
        for source, weight in enumerate(weights):
            assert abs(drawn[source] - (i + 1) * weight / sum(weights)) <= 2
    assert [use.drawn for use in data.uses] == [drawn[source] for source in range(len(weights))]
    if weights == (0.7, 0.3):
        assert [use.drawn for use in Blocks(files, 8, count=10, weights=weights).uses] == [7, 3]


def test_no_weights_are_equal_ones(made):
    files = [made(words(100, 1), "a.txt"), made(words(900, 2), "b.txt")]
    uses = Blocks(files, 8, count=100).uses
    assert [use.drawn for use in uses] == [50, 50]
    assert uses[0].passes > uses[1].passes
    assert blocks_of(Blocks(files, 8, count=100)) == blocks_of(Blocks(files, 8, count=100, weights=[2, 2]))


def test_the_held_out_blocks_are_never_trained_on(made):
    files = [made(numbered(403), "a.txt"), made(words(300, 1), "b.txt")]
    held = Blocks(files, 8, part="validation", validation_blocks=5, weights=[1, 2])
    train = Blocks(files, 8, count=1000, validation_blocks=5, seed=3, weights=[1, 2])
    locations = [held.locate(i) for i in range(len(held))]
    assert len(locations) == len(set(locations)) == 10, "each once"
    assert Counter(source for source, _ in locations) == {0: 5, 1: 5}
    assert [source for source, _ in locations[:4]] in ([0, 1, 0, 1], [1, 0, 1, 0]), "in turn"
    trained = {train.locate(i) for i in range(1000)}
    assert not trained & set(locations)
    assert len(trained) + len(locations) == sum(file.tokens // 8 for file in files), "all others are seen"
    assert [block for source, block in sorted(locations) if source == 0] != list(range(45, 50)), "not just the end"
    other = Blocks(files, 8, part="validation", validation_blocks=5, seed=9)
    assert {other.locate(i) for i in range(10)} == set(locations), "no seed changes what is held out"
    assert [use.blocks for use in train.uses] == [45, 32]
    assert [use.blocks for use in held.uses] == [5, 5]


def test_blocks_go_to_other_processes(made, monkeypatch):
    file = made(numbered(4000))
    data = Blocks([file], 8, seed=1, validation_blocks=3)
    expected = blocks_of(data)
    pickled = pickle.dumps(data)
    assert len(pickled) < 2000, "no tokens and no orders are in it"
    assert blocks_of(pickle.loads(pickled)) == expected
    loader = DataLoader(data, batch_size=4, num_workers=2, multiprocessing_context="fork")
    assert [tuple(row) for batch in loader for row in batch["input_ids"].tolist()] == expected


def test_blocks_that_cannot_be(made, tokenizer, tmp_path, folder):
    import copy

    file = made(words(40))  # 41 tokens with the boundary
    with pytest.raises(
        DataError,
        match=r"text\.txt has 41 tokens, fewer than one block of 64; give more text, or a length of at most 41",
    ):
        Blocks([file], 64)
    assert len(Blocks([file], 41)) == 1
    with pytest.raises(DataError, match=r"5 blocks of 8, and 5 are to be held out; .*at most 6 or fewer to hold out"):
        Blocks([file], 8, validation_blocks=5)
    assert len(Blocks([file], 6, validation_blocks=5)) == 1
    for options, message in (
        ({"length": 1}, "length of a block is 1"),
        ({"count": 0}, "0 blocks are asked for"),
        ({"weights": [1, 2]}, "each of 1 files has one"),
        ({"weights": [0]}, "they are positive"),
        ({"weights": [float("nan")]}, "they are positive"),
        ({"seed": -1}, "the seed is -1"),
        ({"part": "test"}, "it is train or validation"),
        ({"part": "validation"}, "0 blocks are held out"),
    ):
        with pytest.raises(OptionError, match=message):
            Blocks([file], **{"length": 8, **options})
    with pytest.raises(OptionError, match="at least one file"):
        Blocks([], 8)
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["w3x"])
    second = token_file(other, Source(str(tmp_path / "text.txt")), folder)
    with pytest.raises(DataError, match="hold tokens of different tokenizers"):
        Blocks([file, second], 8)


# --- what a model writes


def generate(model, tokenizer, path, **changes):
    return self_generate(model, tokenizer, path, **{"sequences": 7, "length": 12, "batch": 2, "seed": 4, **changes})


def test_what_the_model_writes(llama, tokenizer, tmp_path):
    seen = []
    path = tmp_path / "new" / "own.tokens"
    file = generate(llama, tokenizer, path, progress=lambda *done: seen.append(done))
    assert seen == [(2, 7), (4, 7), (6, 7), (7, 7)]
    assert (file.documents, file.tokens, file.row_tokens, file.boundary) == (7, 84, 12, END)
    assert read_token_file(path) == file
    rows = torch.from_numpy(file.open().astype(np.int64)).view(7, 12)
    for row in rows:
        logits = llama(row[None, :4]).logits[0]
        assert row[1:4].tolist() == logits[:3].argmax(-1).tolist(), (
            "the first tokens after the random one are the likeliest"
        )
    assert len({tuple(row) for row in rows.tolist()}) == 7, "batches differ"
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["own.tokens", "own.tokens.json"]
    data = Blocks([token_file(tokenizer, parse_source(str(path)), tmp_path)], 12)
    assert sorted(blocks_of(data)) == sorted(map(tuple, rows.tolist()))
    assert len(Blocks([file], 6)) == 14
    two = Blocks([file], 24)
    assert len(two) == 3 and all(torch.equal(row.view(2, 12), rows[2 * i : 2 * i + 2]) for i, row in lying(two, rows))
    with pytest.raises(
        DataError, match=r"holds rows of 12 tokens .* Give a length that divides 12, a multiple of it, or 11"
    ):
        Blocks([file], 8)
    other = generate(llama, tokenizer, tmp_path / "other.tokens", seed=5)
    assert ids_of(other) != ids_of(file)


def lying(data, rows):
    """Each block of `data` with the number of the pair of rows that it begins with."""
    for item in range(len(data)):
        block = data[item]["input_ids"]
        yield next(i for i in range(len(rows) // 2) if torch.equal(rows[2 * i], block[: rows.shape[1]])), block


@pytest.mark.parametrize("kill_at", [2, 4, 6, 7])
def test_a_killed_run_goes_on_bit_for_bit(kill_at, llama, tokenizer, tmp_path, monkeypatch):
    whole = generate(llama, tokenizer, tmp_path / "whole.tokens").path.read_bytes()
    path = tmp_path / "own.tokens"

    def stop(done, total):
        if done == kill_at:
            raise Killed

    with pytest.raises(Killed):
        generate(llama, tokenizer, path, progress=stop)
    assert not path.exists()
    with pytest.raises(DataError, match="No such file"):
        read_token_file(path)
    partial = tmp_path / "own.tokens.partial"
    with partial.open("ab") as stream:
        stream.write(b"\x07" * 29)  # a row and a part of one, which the kill cut off
    seen = []
    torch.manual_seed(99)
    file = generate(llama, tokenizer, path, progress=lambda *done: seen.append(done[0]))
    assert path.read_bytes() == whole
    assert seen == [done for done in (2, 4, 6, 7) if done > kill_at], "what was done is not done again"
    assert not list(tmp_path.glob("own.tokens.partial*"))
    # Once more: it is there.
    assert generate(llama, tokenizer, path, progress=lambda *done: pytest.fail("it writes again")) == file


def test_the_last_rename_may_be_what_a_kill_took(llama, tokenizer, tmp_path):
    path = tmp_path / "own.tokens"
    file = generate(llama, tokenizer, path)
    (tmp_path / "own.tokens.partial.json").write_text(json.dumps({**file.recipe, "done": 7}))
    path.rename(tmp_path / "own.tokens.partial")
    assert generate(llama, tokenizer, path, progress=lambda *done: pytest.fail("it writes again")) == file


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"seed": 5}, "seed 4, not 5"),
        ({"batch": 3}, "batch 2, not 3"),
        ({"length": 11}, "length 12, not 11"),
        ({"sequences": 8}, "sequences 7, not 8"),
        ({"model": True}, r"\(model\)"),
        ({"tokenizer": True}, r"\(tokenizer\)"),
    ],
)
def test_another_run_is_not_gone_on_with(changes, what, finished, llama, tokenizer, tmp_path):
    import copy

    path = tmp_path / "own.tokens"

    def stop(done, total):
        if not finished:
            raise Killed

    with contextlib.suppress(Killed):
        generate(llama, tokenizer, path, progress=stop)
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
    changes = dict(changes)
    if changes.pop("model", False):
        llama = copy.deepcopy(llama)
        with torch.no_grad():
            llama.model.layers[1].mlp.up_proj.weight.mul_(1.001)
    if changes.pop("tokenizer", False):
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.add_tokens(["w3x"])
    with pytest.raises(DataError, match=rf"own\.tokens(\.partial)? is another run's .*{what}.*; give another path"):
        generate(llama, tokenizer, path, **changes)
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before


def test_two_processes_do_not_write_one_file(llama, tokenizer, tmp_path):
    path = tmp_path / "own.tokens"

    def second(done, total):
        with pytest.raises(DataError, match=r"another process writes .*own\.tokens\.partial"):
            generate(llama, tokenizer, path)

    generate(llama, tokenizer, path, progress=second)


def test_a_partial_file_of_nobody(llama, tokenizer, tmp_path):
    (tmp_path / "own.tokens.partial").write_bytes(b"what is this")
    with pytest.raises(DataError, match=r"does not say what .*own\.tokens\.partial holds; delete both"):
        generate(llama, tokenizer, tmp_path / "own.tokens")


def test_a_partial_file_that_was_cut(llama, tokenizer, tmp_path):
    """It would be made longer by zeros, which are tokens too."""
    path = tmp_path / "own.tokens"
    recipe = generate(llama, tokenizer, path).recipe
    (tmp_path / "own.tokens.partial.json").write_text(json.dumps({**recipe, "done": 4}))
    (tmp_path / "own.tokens.partial").write_bytes(path.read_bytes()[: 4 * 24 - 1])
    path.unlink()
    with pytest.raises(DataError, match=r"own\.tokens\.partial is shorter than .*partial\.json says"):
        generate(llama, tokenizer, path)


def test_the_mode_of_the_model_comes_back(tokenizer, tmp_path):
    from tests.conftest import tiny_llama_config
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(tiny_llama_config(attention_dropout=0.5)).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    gradients = []
    model.register_forward_hook(lambda *_: gradients.append(torch.is_grad_enabled()))
    trained = ids_of(generate(model, tokenizer, tmp_path / "a.tokens"))
    assert [module.training for module in model.modules()] == modes
    assert trained == ids_of(generate(model.eval(), tokenizer, tmp_path / "b.tokens"))
    assert not any(gradients)


def test_what_cannot_be_written(llama, tokenizer, tmp_path):
    path = tmp_path / "own.tokens"
    for changes, message in (
        ({"sequences": 0}, "0 sequences are asked for"),
        ({"length": 0}, "0 tokens a sequence"),
        ({"batch": 0}, "0 sequences a batch"),
        ({"length": 129}, "129 tokens a sequence are asked for, but the model has 128 positions"),
    ):
        with pytest.raises(OptionError, match=message):
            generate(llama, tokenizer, path, **changes)
    with pytest.raises(OptionError, match=r"ends in \.tokens"):
        generate(llama, tokenizer, tmp_path / "own.bin")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match=r"cannot be written \(.*\); give another path"):
        generate(llama, tokenizer, tmp_path / "file" / "own.tokens")
    with torch.no_grad():
        llama.model.norm.weight.fill_(float("nan"))
    with pytest.raises(WeightError, match="NaN or infinite"):
        generate(llama, tokenizer, path)
    assert not path.exists()
