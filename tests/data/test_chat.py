"""Conversations: which tokens are the assistant's, and the rows that a run sees."""

import json

import numpy as np
import pytest
import torch

from signbit.data import Blocks, token_file
from signbit.data.chat import Chat, tokens_of
from signbit.data.corpus import parse_source
from signbit.errors import DataError


def turns(*words):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(words)]


@pytest.fixture
def instruct(tokenizer):
    """The tokenizer with a template in which each word is a token."""
    import copy

    made = copy.deepcopy(tokenizer)
    made.chat_template = (
        "{% for m in messages %}{{ 'w50' if m['role'] == 'user' else 'w51' }} {{ m['content'] }} </s> {% endfor %}"
        "{% if add_generation_prompt %}w51 {% endif %}"
    )
    return made


def write(path, *conversations):
    path.write_text("\n".join(json.dumps({"messages": messages}) for messages in conversations))
    return path


def test_what_the_assistant_says_and_its_end_are_learnt(instruct):
    ids, learnt = tokens_of(instruct, Chat(turns("w1 w2", "w3 w4 w5", "w6", "w7"), "here", 0))
    words = instruct.convert_ids_to_tokens(ids)
    assert words == [
        "w50",
        "w1",
        "w2",
        "</s>",
        "w51",
        "w3",
        "w4",
        "w5",
        "</s>",
        "w50",
        "w6",
        "</s>",
        "w51",
        "w7",
        "</s>",
    ]
    assert [word for word, is_learnt in zip(words, learnt, strict=True) if is_learnt] == [
        "w3",
        "w4",
        "w5",
        "</s>",
        "w7",
        "</s>",
    ]


def test_rows_are_cut_and_filled_up(instruct, tmp_path):
    path = write(
        tmp_path / "chat.jsonl",
        turns("w1", "w2"),
        turns("w1 w2 w3 w4 w5 w6 w7", "w8"),
        turns("w9", "w10 " * 20),
        turns("w1"),
    )
    file = token_file(instruct, parse_source(str(path)), tmp_path / "cache", length=8)
    assert file.recipe == {"conversations": 2, "cut": 2, "left_out": 2} and file.row_tokens == 8
    rows, marks = (np.asarray(part).reshape(2, 8) for part in (file.open(), file.open_learnt()))
    assert instruct.convert_ids_to_tokens(rows[0]) == ["w50", "w1", "</s>", "w51", "w2", "</s>", "</s>", "</s>"]
    assert marks.tolist() == [[0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]]
    again = token_file(instruct, parse_source(str(path)), tmp_path / "cache", length=8)
    assert again.path == file.path
    other = token_file(instruct, parse_source(str(path)), tmp_path / "cache", length=16)
    assert other.path != file.path and other.recipe["left_out"] == 1
    instruct.chat_template = instruct.chat_template.replace("w50", "w49")
    assert token_file(instruct, parse_source(str(path)), tmp_path / "cache", length=8).path != file.path
    limited = token_file(instruct, parse_source(f"{path}@15"), tmp_path / "cache", length=8)
    assert limited.recipe["conversations"] == 1


def test_of_a_prompt_and_its_completion_the_completion_is_learnt(tokenizer, tmp_path, monkeypatch):
    """No template is needed; the end of the text is learnt, what the tokenizer puts in front is not."""
    monkeypatch.setattr(tokenizer, "chat_template", None)
    ids, learnt = tokens_of(tokenizer, Chat(("w1 w2 ", "w3 w4"), "here", 0))
    told = dict(zip(tokenizer.convert_ids_to_tokens(ids), learnt, strict=True))
    assert [told.pop(word) for word in ("w1", "w2", "w3", "w4", "</s>")] == [False, False, True, True, True]
    assert not any(told.values())
    assert not any(tokens_of(tokenizer, Chat(("w1 w2", ""), "here", 0))[1]), "an empty one teaches nothing"
    path = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": "w1 ", "completion": "w2"}, {"prompt": "w1 w2 w3 ", "completion": "w4"}]
    path.write_text("\n".join(json.dumps(pair) for pair in pairs))
    file = token_file(tokenizer, parse_source(str(path)), tmp_path / "cache", length=8)
    assert file.recipe["conversations"] == 2
    marks = np.asarray(file.open_learnt()).reshape(2, 8)
    rows = np.asarray(file.open()).reshape(2, 8)
    for row, mark, word in zip(rows, marks, ("w2", "w4"), strict=True):
        words = tokenizer.convert_ids_to_tokens(row)
        assert [w for w, m in zip(words, mark, strict=True) if m] == [word, "</s>"]


def test_text_beside_conversations_is_learnt_from_whole(instruct, tmp_path):
    chat = write(tmp_path / "chat.jsonl", *[turns("w1", f"w{i}") for i in range(20)])
    (tmp_path / "text.txt").write_text("w1 w2 w3 w4 " * 40)
    sources = [parse_source(str(chat)), parse_source(str(tmp_path / "text.txt"))]
    files = [token_file(instruct, source, tmp_path / "cache", length=8) for source in sources]
    items = list(Blocks(files, 8, 20))
    assert len(items) == 20 and all(item["learnt"].dtype is torch.bool for item in items)
    assert sorted({int(item["learnt"].sum()) for item in items}) == [2, 8]
    assert "learnt" not in Blocks(files[1:], 8, 5)[0]


def test_a_template_that_rewrites_is_refused(instruct):
    instruct.chat_template = "{{ messages | length }}{% for m in messages %} {{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match="writes earlier messages otherwise"):
        tokens_of(instruct, Chat(turns("w1", "w2"), "here", 0))


def test_what_is_no_conversation_is_refused(instruct, tmp_path):
    def made(text, length=8):
        path = tmp_path / "chat.jsonl"
        path.write_text(text)
        return token_file(instruct, parse_source(str(path)), tmp_path / "cache", length=length)

    with pytest.raises(DataError, match="line 1: not a conversation"):
        made('{"messages": [{"role": "user"}]}')
    with pytest.raises(DataError, match="holds no conversation in which the assistant says something"):
        made('{"messages": [{"role": "user", "content": "w1"}]}')
    with pytest.raises(DataError, match="holds conversations"):
        made('{"messages": []}', length=None)
    instruct.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(DataError, match="refuses it"):
        made(json.dumps({"messages": turns("w1", "w2")}))
    instruct.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        made(json.dumps({"messages": turns("w1", "w2")}))
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "a.jsonl", turns("w1", "w2"))
    (folder / "b.txt").write_text("w1")
    with pytest.raises(DataError, match=r"holds messages and .* holds text"):
        token_file(instruct, parse_source(str(folder)), tmp_path / "cache", length=8)
