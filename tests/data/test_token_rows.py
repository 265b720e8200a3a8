"""Text that is tokenized already: a row of token ids in each line, as LLM360's AmberDatasets has it."""

import gzip
import json
import tracemalloc

import pytest

from signbit.data import Blocks, parse_source, token_file
from signbit.errors import DataError

ROWS = [[3 + (i * 7 + j) % 61 for j in range(9)] for i in range(5)]


def write(path, rows, **more):
    lines = "".join(json.dumps({"token_ids": row, "source": "arxiv", **more}) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines)
    return path


def made(tokenizer, path, folder, **more):
    return token_file(tokenizer, parse_source(str(path)), folder, **more)


@pytest.mark.parametrize("name", ["train_000.jsonl", "train_000.jsonl.gz"])
def test_ids_are_taken_as_they_are(tokenizer, tmp_path, name):
    file = made(tokenizer, write(tmp_path / name, ROWS), tmp_path / "tokens")
    assert file.open().tolist() == [token for row in ROWS for token in row]
    assert (file.documents, file.tokens, file.row_tokens, file.boundary, file.dtype) == (5, 45, 9, None, "uint16")
    assert made(tokenizer, tmp_path / name, tmp_path / "tokens") == file, "found again"


def test_chunks_of_a_directory_follow_each_other(tokenizer, tmp_path):
    (tmp_path / "amber").mkdir()
    write(tmp_path / "amber" / "train_001.jsonl", ROWS[2:])
    write(tmp_path / "amber" / "train_000.jsonl", ROWS[:2])
    assert made(tokenizer, tmp_path / "amber", tmp_path / "tokens").open().tolist() == [
        token for row in ROWS for token in row
    ]
    (tmp_path / "amber" / "more.txt").write_text("w1 w2")
    with pytest.raises(
        DataError, match=r"train_000\.jsonl holds token_ids and .*more\.txt holds text; give them as two"
    ):
        made(tokenizer, tmp_path / "amber", tmp_path / "tokens")


def test_a_limit_takes_whole_rows(tokenizer, tmp_path):
    path = write(tmp_path / "train_000.jsonl", ROWS)
    file = made(tokenizer, f"{path}@20", tmp_path / "tokens")
    assert file.open().tolist() == [*ROWS[0], *ROWS[1]] and "limit of 20 tokens" in file.source
    with pytest.raises(DataError, match="holds no row that the limit of 8 tokens has room for"):
        made(tokenizer, f"{path}@8", tmp_path / "tokens")


@pytest.mark.parametrize(
    ("length", "blocks"),
    [
        (8, [tuple(row[:8]) for row in ROWS]),  # the ninth is a label only, as FBI-LLM has it
        (9, [tuple(row) for row in ROWS]),
        (3, [tuple(row[i : i + 3]) for row in ROWS for i in (0, 3, 6)]),
        (18, [tuple(ROWS[0] + ROWS[1]), tuple(ROWS[2] + ROWS[3])]),
    ],
)
def test_blocks_keep_to_rows(tokenizer, tmp_path, length, blocks):
    file = made(tokenizer, write(tmp_path / "a.jsonl", ROWS), tmp_path / "tokens")
    data = Blocks([file], length)
    assert sorted(tuple(item["input_ids"].tolist()) for item in (data[i] for i in range(len(data)))) == sorted(blocks)


def test_another_length_is_refused(tokenizer, tmp_path):
    file = made(tokenizer, write(tmp_path / "a.jsonl", ROWS), tmp_path / "tokens")
    with pytest.raises(DataError, match="Give a length that divides 9, a multiple of it, or 8"):
        Blocks([file], 7)


def test_rows_and_text_are_mixed(tokenizer, tmp_path):
    rows = made(tokenizer, write(tmp_path / "a.jsonl", ROWS), tmp_path / "tokens")
    (tmp_path / "b.txt").write_text("w1 w2 w3 w4 " * 20)
    text = made(tokenizer, tmp_path / "b.txt", tmp_path / "tokens")
    data = Blocks([rows, text], 8, count=20)
    assert [use.blocks for use in data.uses] == [5, 10] and [use.drawn for use in data.uses] == [10, 10]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"token_ids": [3, 4]}, {"token_ids": [5]}], r"line 2 has 1 token ids, and the lines before have 2"),
        ([{"token_ids": [3, 64]}], "line 1 has the token 64, but the model's tokenizer has 64"),
        ([{"token_ids": [3, -1]}], "line 1 has the token -1"),
        ([{"token_ids": [3, 4]}, {"text": "w1"}], "line 2: not a JSON object with token_ids, which are whole numbers"),
        ([{"token_ids": [3, 4.0]}], "line 1: not a JSON object with token_ids"),
        ([{"token_ids": [True, 4]}], "line 1: not a JSON object with token_ids"),
        ([{"token_ids": []}], "line 1: not a JSON object with token_ids"),
        ([{"token_ids": [3, 4]}, [3, 4]], "line 2: not a JSON object with token_ids"),
    ],
)
def test_wrong_rows_are_refused(tokenizer, tmp_path, lines, message):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=message):
        made(tokenizer, path, tmp_path / "tokens")
    assert not list((tmp_path / "tokens").glob("*")), "nothing is left"


def test_a_line_that_is_no_json_is_named(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)
    path.write_text(path.read_text() + '{"token_ids": [3,')
    with pytest.raises(DataError, match=r"a\.jsonl, line 6: not a JSON object"):
        made(tokenizer, path, tmp_path / "tokens")


def test_a_line_with_a_text_too_is_text(tokenizer, tmp_path):
    file = made(tokenizer, write(tmp_path / "a.jsonl", ROWS, text="w1 w2"), tmp_path / "tokens")
    assert file.row_tokens is None and file.documents == 5


def test_a_chunk_is_never_in_memory(tokenizer, tmp_path):
    """13 MB of lines are read with less than one in memory; the original parsed a whole chunk of 3.5G tokens."""
    path, line = tmp_path / "a.jsonl", json.dumps({"token_ids": [50] * 2049}) + "\n"
    with path.open("w") as stream:
        for _ in range(1600):
            stream.write(line)
    (tmp_path / "tokens").mkdir()
    seen = []
    tracemalloc.start()
    file = made(tokenizer, path, tmp_path / "tokens", progress=lambda done, total: seen.append((done, total)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Digests are taken of pieces of 4 MB.
    assert file.documents == 1600 and peak < 9e6 < path.stat().st_size, peak
    assert len(seen) == 3 and seen == sorted(seen) and seen[-1][1] == path.stat().st_size
