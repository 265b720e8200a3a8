"""Limits of tokens, and sets of the hub that are read row by row."""

import hashlib
import io
import json
import sys
from types import SimpleNamespace

import pytest

from signbit.data import Source, TrainingData, parse_source, read_token_file, token_file
from signbit.data import tokenfile as tokenfile_module
from signbit.data.sources import text_of
from signbit.data.tokenfile import tokenizer_digest
from signbit.errors import DataError

END = 2  # the id of </s>
COMMIT, LATER = "a" * 40, "b" * 40


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "tokens"


def ids_of(file):
    return file.open().tolist()


def mute(*args, **named):
    raise AssertionError("text is tokenized")


class Mute:
    """A tokenizer that must not be asked for ids."""

    __call__ = mute

    def __init__(self, inner):
        self._inner = inner

    def __getattr__(self, name):
        return getattr(self._inner, name)


# --- limits as they are written


@pytest.fixture
def named(tmp_path, monkeypatch):
    """A directory of files whose names have the signs of limits and weights."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "a@b.txt", "c=2.txt", "own.tokens"):
        (tmp_path / name).write_text("w1")
    for name in ("v@2", "v=1@5k", "x=1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text("w1")


@pytest.mark.parametrize(
    ("word", "source"),
    [
        ("a.txt@7", Source("a.txt", 1.0, 7)),
        ("a.txt@50k=0.7", Source("a.txt", 0.7, 50_000)),
        ("c4@2M", Source("c4", 1.0, 2_000_000)),
        ("hub:allenai/c4:en:train:text@50M=0.7", Source("hub:allenai/c4:en:train:text", 0.7, 50_000_000)),
        ("hub:allenai/c4:en:train:text@1.5G", Source("hub:allenai/c4:en:train:text", 1.0, 1_500_000_000)),
        ("hub:allenai/c4@v1:en:train:text", Source("hub:allenai/c4@v1:en:train:text")),
        ("hub:a/b@refs/convert/parquet::train:text@3k", Source("hub:a/b@refs/convert/parquet::train:text", 1.0, 3000)),
        ("hub:a/b:x=1/y@2.json.gz:train:text@3", Source("hub:a/b:x=1/y@2.json.gz:train:text", 1.0, 3)),
        ("hub:a/b:x=1/y.json.gz:train:text", Source("hub:a/b:x=1/y.json.gz:train:text")),
        ("hub:v@2::train:text", Source("hub:v@2::train:text")),
        ("a@b.txt", Source("a@b.txt")),
        ("a@b.txt=2", Source("a@b.txt", 2.0)),
        ("a@b.txt@3k=2", Source("a@b.txt", 2.0, 3000)),
        ("c=2.txt@1M", Source("c=2.txt", 1.0, 1_000_000)),
        ("c=2.txt@1M=5", Source("c=2.txt", 5.0, 1_000_000)),
        ("x=1", Source("x=1")),
        ("v=1@5k", Source("v=1@5k")),
        ("v=1@5k@2k=3", Source("v=1@5k", 3.0, 2000)),
        ("x=1/x.txt@2k", Source("x=1/x.txt", 1.0, 2000)),
        ("v@2", Source("v@2")),
        ("v@2@9", Source("v@2", 1.0, 9)),
        ("v@2/x.txt", Source("v@2/x.txt")),
    ],
)
def test_limits_of_the_command_line(word, source, named):
    assert parse_source(word) == source


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "a.txt@0",
            r"a\.txt@0: 0 is no limit of tokens, and there is no file of this name; a limit is a positive whole",
        ),
        ("a.txt@0k", "0k is no limit of tokens"),
        ("a.txt@-5", "-5 is no limit of tokens"),
        ("a.txt@", r"a\.txt@: nothing is no limit of tokens"),
        ("a.txt@1.5", r"1\.5 is no limit of tokens"),
        ("a.txt@0.0001k", r"0\.0001k is no limit of tokens"),
        ("a.txt@1e6", "1e6 is no limit of tokens"),
        ("a.txt@5m", r"5m is no limit of tokens.*thousands \(50k\), millions \(50M\) or thousand millions \(1\.5G\)"),
        ("a.txt@much=2", "much is no limit of tokens"),
        ("a.txt@٣", "is no limit of tokens"),
        ("me@home.txt", r"home\.txt is no limit of tokens, and there is no file of this name"),
        ("a.txt@1k@2k", r"a\.txt@1k@2k has two limits; give one \(a\.txt@2k\)"),
        ("hub:a/b::train:text@1k@2k", r"has two limits; give one \(hub:a/b::train:text@2k\)"),
        ("a.txt=0.7@1k", r"a limit stands before a weight \(a\.txt@1k=0\.7\), and there is no file a\.txt=0\.7"),
        ("c4@1k=much", "much is no weight"),
        ("c4@1k=0", "c4 has the weight 0"),
        ("gone.txt@1k", r"gone\.txt: no such file; .*a limit of tokens and a weight may follow \(NAME@50M=0\.7\)"),
        ("v@3/x.txt", r"v@3/x\.txt: no such file"),
        ("own.tokens@1k", r"own\.tokens is tokenized already and read as it is; leave its limit away"),
        ("hub:a/b::train:text@0", "0 is no limit of tokens"),
        ("hub:a/b@::train:text", r"a revision is of a data set of the hub \(DATASET@REVISION\); give both"),
        ("hub:@v1::train:text", "a revision is of a data set of the hub"),
        ("hub:v@2@v1::train:text", "a revision is of a data set of the hub"),
    ],
)
def test_limits_that_are_none(word, message, named):
    with pytest.raises(DataError, match=message):
        parse_source(word)


def test_a_limit_belongs_to_its_source(named):
    assert TrainingData.parse(["a.txt@5k=0.7", "c4@2M=0.3"]).weights == (0.7, 0.3)
    with pytest.raises(DataError, match="c4@2M has no weight, but other sources have one"):
        TrainingData.parse(["a.txt@5k=0.7", "c4@2M"])
    with pytest.raises(DataError, match=r"a\.txt is given twice"):
        TrainingData.parse(["a.txt@5k", "a.txt@6k"])
    with pytest.raises(DataError, match="a limit of 0 tokens; a limit is a positive whole number"):
        Source("a.txt", max_tokens=0)


# --- what a limit takes


@pytest.mark.parametrize("boundary", [True, False])
@pytest.mark.parametrize("characters", [1, 9, 1_000_000])
def test_a_limit_takes_the_first_tokens(characters, boundary, tokenizer, tmp_path, folder, monkeypatch):
    import copy

    if not boundary:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.eos_token = tokenizer.bos_token = None
    monkeypatch.setattr(tokenfile_module, "_BATCH_CHARACTERS", characters)
    documents = ["w1 w2 w3", " ", "w4", "w5 w6"]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    whole = token_file(tokenizer, Source(str(path)), folder)
    assert whole.documents == 3
    ends = (3, 4, 6)  # the tokens of the text alone when a document ends
    for limit in range(1, whole.tokens + 3):
        file = token_file(tokenizer, Source(str(path), max_tokens=limit), folder)
        assert ids_of(file) == ids_of(whole)[:limit], "the document is cut, and has no boundary"
        taken = sum(i != END for i in ids_of(file))
        assert file.documents == 1 + sum(taken > end for end in ends[:-1])
        assert file.source == f"{path} (limit of {limit} tokens)"
        assert read_token_file(file.path) == file
    assert len({*folder.glob("*.tokens")}) == whole.tokens + 3, "each limit has its file"


def test_a_limit_cuts_a_long_document(tokenizer, tmp_path, folder):
    path = tmp_path / "a.txt"
    path.write_text("w1 " * 100_000)
    file = token_file(tokenizer, Source(str(path), max_tokens=150_000 // 2), folder)
    assert (file.documents, ids_of(file)) == (1, [4] * 75_000)


def test_more_tokens_than_characters(tokenizer, tmp_path, folder):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x"}) + "\n")
    path.write_text(path.read_text() * 50)
    file = token_file(tokenizer, Source(str(path), max_tokens=10), folder)
    assert (file.documents, ids_of(file)) == (5, [0, END] * 5), "what was read beyond the limit does not count"


def test_a_limit_is_made_once(tokenizer, tmp_path, folder):
    path = tmp_path / "a.txt"
    path.write_text("w1 w2 w3 " * 1000)
    limited = token_file(tokenizer, parse_source(f"{path}@2k"), folder)
    assert token_file(Mute(tokenizer), parse_source(f"{path}@2000"), folder) == limited
    whole = token_file(tokenizer, parse_source(str(path)), folder)
    assert whole.path != limited.path
    # Golden: what was tokenized before there were limits is found.
    text = hashlib.sha256(path.read_bytes()).hexdigest()
    key = f'[1, [["lines", "{text}"]], "{tokenizer_digest(tokenizer)}", {END}]'
    assert whole.path.name == f"{hashlib.sha256(key.encode()).hexdigest()}.tokens"


def test_what_lies_behind_a_limit_is_not_read(tokenizer, tmp_path, folder):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "w1 w2 w3"}) + "\n" + "no JSON\n")
    assert ids_of(token_file(tokenizer, parse_source(f"{path}@3"), folder)) == [4, 5, 6]
    with pytest.raises(DataError, match="line 2: not a JSON object"):
        token_file(tokenizer, parse_source(f"{path}@5"), folder)


def test_progress_is_of_the_limit(tokenizer, tmp_path, folder, monkeypatch):
    monkeypatch.setattr(tokenfile_module, "_BATCH_CHARACTERS", 100)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"w{i % 61} w1 w2"}) + "\n" for i in range(100)))
    seen = []
    token_file(tokenizer, parse_source(f"{path}@200"), folder, progress=lambda *done: seen.append(done))
    assert len(seen) > 5
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {200}
    assert seen[-1] == (200, 200)
    seen.clear()
    token_file(tokenizer, parse_source(f"{path}@1k"), folder, progress=lambda *done: seen.append(done))
    assert seen[-1] == (400, 1000), "the text has no more"


def test_a_bar_of_what_has_no_known_end(monkeypatch):
    from signbit.cli.output import Bars

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    bars = Bars()
    bars("tokenizing rows", 5, None, "")
    bars("tokenizing limit", 5, 10, "")
    bars.close()
    assert "tokenizing rows: 0it" in terminal.getvalue(), "a count, not a share"
    assert "tokenizing limit:" in terminal.getvalue()


# --- sets of the hub, as `datasets` streams them


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """The package, which must not load a set as a whole; its cache is empty."""
    datasets = pytest.importorskip("datasets", reason="hub data sets come through datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def whole(*args, **named):
        raise AssertionError("the set is loaded as a whole")

    monkeypatch.setattr(datasets, "load_dataset", whole)
    monkeypatch.setattr(datasets.DatasetBuilder, "download_and_prepare", whole)
    return datasets


def write_set(directory, rows, kind):
    """A data set of two files."""
    directory.mkdir(exist_ok=True)
    for part in range(2):
        some = rows[part * len(rows) // 2 : (part + 1) * len(rows) // 2]
        path = directory / f"train-{part:05d}-of-00002.{kind}"
        if kind == "parquet":
            import pyarrow
            from pyarrow.parquet import write_table

            table = {"words": pyarrow.array(some, pyarrow.string()), "other": list(range(len(some)))}
            write_table(pyarrow.table(table), path, row_group_size=10)
        else:
            path.write_text("".join(json.dumps({"words": row, "other": 1}) + "\n" for row in some))


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_set_is_streamed_in_its_order(kind, datasets, tokenizer, tmp_path, folder):
    rows = [f"w{i % 61} w{i // 61}" if i != 7 else None for i in range(100)]
    write_set(tmp_path / "own", rows, kind)
    name = f"hub:{tmp_path / 'own'}::train:words"
    file = token_file(tokenizer, parse_source(name), folder)
    expected = [i for row in rows if row for i in (*tokenizer(row).input_ids, END)]
    assert (ids_of(file), file.documents) == (expected, 99)
    limited = token_file(tokenizer, parse_source(f"{name}@100"), folder)
    assert ids_of(limited) == expected[:100]
    assert token_file(Mute(tokenizer), parse_source(f"{name}@100"), folder) == limited
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"], (
        "nothing of it is kept"
    )
    with pytest.raises(DataError, match="holds list, no text; name another column"):
        text_of([{"role": "user"}], "own", "words")
    with pytest.raises(DataError, match=r"own.* has no column text; it has words, other"):
        token_file(tokenizer, parse_source(name.replace("words", "text")), folder)
    with pytest.raises(DataError, match=r"could not be loaded from the hub \(Bad split: test"):
        token_file(tokenizer, parse_source(name.replace("train", "test")), folder)
    # Another text under the same names.
    write_set(tmp_path / "own", [f"{row} w9" for row in rows], kind)
    assert ids_of(token_file(tokenizer, parse_source(f"{name}@100"), folder)) != ids_of(limited)


# --- sets of the hub, as this test makes them


class Hub:
    """Stands for `datasets`: a set whose rows are counted as they are read."""

    def __init__(self, rows, **about):
        self.rows, self.asked, self.read, self.open = rows, [], 0, 0
        self.about = {"name": "parquet", "hash": COMMIT, "splits": None, "columns": ["text"], "fails_at": None, **about}
        self.column_names = self.about["columns"]

    def load_dataset_builder(self, *args, **named):
        self.asked.append((args, named))
        info = SimpleNamespace(splits=self.about["splits"])
        return SimpleNamespace(
            name=self.about["name"], hash=self.about["hash"], info=info, as_streaming_dataset=self.stream
        )

    def stream(self, split):
        assert split == "train"
        return self

    def select_columns(self, names):
        assert names == ["text"]
        return self

    def __iter__(self):
        self.open += 1
        try:
            for number in range(self.rows):
                if number == self.about["fails_at"]:
                    raise self.about["error"]
                self.read += 1
                yield {"text": f"w{number % 61} w1 w2"}
        finally:
            self.open -= 1


@pytest.fixture
def hub(monkeypatch):
    def make(rows=200_000, **about):
        made = Hub(rows, **about)
        monkeypatch.setitem(sys.modules, "datasets", made)
        return made

    return make


NAME = "hub:me/set:en:train:text"


@pytest.mark.parametrize("limit", [1, 10, 4000, 400_000])
def test_little_more_is_read_than_the_limit(limit, hub, tokenizer, folder):
    rows = hub()
    file = token_file(tokenizer, parse_source(f"{NAME}@{limit}"), folder)
    needed = -(-limit // 4)
    assert (file.tokens, file.documents) == (limit, needed)
    assert needed <= rows.read <= needed + 1, "of many"
    assert not rows.open, "the reading is ended"
    assert token_file(Mute(tokenizer), parse_source(f"{NAME}@{limit}"), folder) == file
    assert rows.read <= needed + 1, "nothing is read anew"


def test_a_set_without_a_limit_is_read_to_its_end(hub, tokenizer, folder):
    hub(1000, splits={"train": SimpleNamespace(num_examples=1000)})
    seen = []
    file = token_file(tokenizer, parse_source(NAME), folder, progress=lambda *done: seen.append(done))
    assert (file.documents, file.tokens) == (1000, 4000)
    assert seen == [(1000, 1000)], "rows, and how many the set says it has"
    assert file.source == f"me/set@{COMMIT} (en, train)"


def test_a_file_is_that_of_a_commit(hub, tokenizer, folder):
    rows = hub()
    first = token_file(tokenizer, parse_source(f"{NAME}@40"), folder)
    assert rows.asked == [(("me/set", "en"), {"revision": None})]
    assert first.source == f"me/set@{COMMIT} (en, train) (limit of 40 tokens)"
    # A commit that is named is not asked for, and whatever leads to the same one finds the same file.
    rows = hub()
    pinned = token_file(Mute(tokenizer), parse_source(f"{NAME.replace('set', f'set@{COMMIT}')}@40"), folder)
    assert (pinned, rows.asked) == (first, [])
    tag = token_file(Mute(tokenizer), parse_source(f"{NAME.replace('set', 'set@v1')}@40"), folder)
    assert (tag, rows.asked) == (first, [(("me/set", "en"), {"revision": "v1"})])
    # Another commit, limit, configuration, column or set is another file.
    hub(hash=LATER)
    files = {first.path, token_file(tokenizer, parse_source(f"{NAME}@40"), folder).path}
    rows = hub()
    rows.column_names = None
    for word in (f"{NAME}@41", f"{NAME.replace('en', 'de')}@40", f"{NAME.replace('me', 'you')}@40"):
        files.add(token_file(tokenizer, parse_source(word), folder).path)
    assert len(files) == 5
    with pytest.raises(DataError, match=f"me/set@{COMMIT} .en, train. has no column words; it has text"):
        token_file(tokenizer, parse_source("hub:me/set:en:train:words@40"), folder)


def test_a_commit_that_is_named_is_the_one_that_is_read(hub, tokenizer, folder):
    rows = hub(hash=LATER)
    file = token_file(tokenizer, parse_source(f"hub:me/set@{LATER}:en/a.json.gz:train:text@4"), folder)
    assert rows.asked == [(("me/set", None), {"revision": LATER, "data_files": {"train": "en/a.json.gz"}})]
    assert file.source == f"me/set@{LATER} (en/a.json.gz, train) (limit of 4 tokens)"


def test_a_hub_that_is_not_reached(datasets, tokenizer, folder):
    with pytest.raises(
        DataError, match=r"me/set could not be loaded .*; give local files; tokens made before .*@COMMIT"
    ):
        token_file(tokenizer, parse_source(NAME), folder)


def test_what_was_loaded_once_is_not_taken_for_the_set(hub, tokenizer, folder):
    hub(name="cache")
    with pytest.raises(
        DataError, match=r"me/set could not be loaded .*\(the hub does not answer\); give local files; .*DATASET@COMMIT"
    ):
        token_file(tokenizer, parse_source(f"{NAME}@40"), folder)


@pytest.mark.parametrize(
    "error", [ConnectionError("Server Disconnected"), RuntimeError("403\nForbidden"), ValueError()]
)
def test_a_network_that_fails_leaves_nothing(error, hub, tokenizer, folder, monkeypatch):
    monkeypatch.setattr(tokenfile_module, "_BATCH_CHARACTERS", 1000)
    rows = hub(fails_at=1234, error=error)
    what = {"ConnectionError": "Server Disconnected", "RuntimeError": "403", "ValueError": "ValueError"}
    message = rf"me/set@a* \(en, train\) broke off after 1,234 rows \({what[type(error).__name__]}\), and nothing"
    seen = []
    with pytest.raises(DataError, match=message):
        token_file(tokenizer, parse_source(f"{NAME}@1M"), folder, progress=lambda *done: seen.append(done))
    assert len(seen) == 10, "much was written"
    assert not list(folder.iterdir())
    assert not rows.open
    # What lies before the break can be had.
    assert token_file(tokenizer, parse_source(f"{NAME}@2k"), folder).tokens == 2000
