"""A teacher's likeliest tokens on the disk: what stands there, that a kill changes nothing, and what does not fit."""

import contextlib
import copy
import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from signbit.data import (
    Blocks,
    Source,
    TaughtBlocks,
    read_teacher_logits,
    read_token_file,
    self_generate,
    token_file,
    write_teacher_logits,
)
from signbit.errors import DataError, OptionError, WeightError

LENGTH, TOP = 8, 5


@pytest.fixture
def teacher(llama):
    """A random model that is sure enough for its likeliest tokens to be the same ones however they are multiplied."""
    with torch.no_grad():
        llama.model.norm.weight.mul_(30)
    return llama


@pytest.fixture
def files(tokenizer, tmp_path):
    """Of 61 tokens (7 blocks) and of 43 (5 blocks)."""
    made = []
    for name, count in (("a.txt", 60), ("b.txt", 42)):
        (tmp_path / name).write_text(" ".join(f"w{i}" for i in torch.randint(61, (count,)).tolist()))
        made.append(token_file(tokenizer, Source(str(tmp_path / name)), tmp_path / "tokens"))
    return made


def write(teacher, files, path, digest="0" * 64, **changes):
    return write_teacher_logits(teacher, digest, files, path, **{"length": LENGTH, "top": TOP, "batch": 5, **changes})


def answers(teacher, ids, top=TOP):
    """Ids and log p [T, K] of one block, by another way: the whole distribution, sorted."""
    with torch.no_grad():
        log_p = teacher(ids[None]).logits[0].double().log_softmax(-1)
    order = log_p.argsort(dim=-1, descending=True)[:, :top]
    return order, log_p.gather(1, order)


def told(item, teacher, top=TOP):
    """Whether an item has the answers to its own ids, to float16's rounding."""
    ids, log_p = answers(teacher, item["input_ids"], top)
    near = torch.allclose(item["top_log_p"].double(), log_p, rtol=2**-11, atol=1e-5)
    return item["top_ids"].tolist() == ids.tolist() and near


# --- what is written


def test_the_file_holds_what_the_teacher_says(teacher, files, tmp_path):
    seen = []
    path = tmp_path / "new" / "some.logits"
    made = write(teacher, files, path, progress=lambda *done: seen.append(done))
    assert seen == [(5, 12), (10, 12), (12, 12)]
    assert path.stat().st_size == 12 * LENGTH * TOP * (2 + 2)
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["some.logits", "some.logits.json"]
    raw = np.fromfile(path, "<u2").reshape(12, LENGTH, 2, TOP)
    place = 0
    for file in files:
        tokens = torch.from_numpy(file.open().astype(np.int64))
        for begin in range(0, len(tokens) - LENGTH + 1, LENGTH):
            item = {
                "input_ids": tokens[begin : begin + LENGTH],
                "top_ids": torch.from_numpy(raw[place, :, 0].astype(np.int64)),
                "top_log_p": torch.from_numpy(raw[place, :, 1].copy().view(np.float16)),
            }
            assert told(item, teacher), place
            place += 1
    assert place == 12 == made.blocks
    assert not np.array_equal(raw[0], raw[1])
    values = json.loads((path.parent / "some.logits.json").read_text())
    assert values.pop("format") == 1 and [file.pop("sha256") != "" for file in values["files"]] == [True, True]
    assert values == {
        "teacher": "0" * 64, "tokenizer": files[0].tokenizer, "vocabulary": 64, "length": LENGTH, "top": TOP,
        "dtype": "uint16", "precision": "float32", "batch": 5,
        "files": [{"name": files[0].path.name, "blocks": 7}, {"name": files[1].path.name, "blocks": 5}],
    }  # fmt: skip
    assert read_teacher_logits(path) == made


@pytest.mark.parametrize("swapped", [False, True])
def test_blocks_come_with_their_answers(swapped, teacher, files, tmp_path):
    """However they are drawn: shuffled, held out, weighted, another order of the files, several passes."""
    made = write(teacher, files, tmp_path / "some.logits")
    files = files[::-1] if swapped else files
    train = Blocks(files, LENGTH, 40, [1, 3], 7, "train", 2)
    held = Blocks(files, LENGTH, part="validation", validation_blocks=2)
    for blocks in (train, held, Blocks(files[:1], LENGTH)):
        taught = TaughtBlocks(blocks, made)
        assert len(taught) == len(blocks)
        for i in range(len(taught)):
            item = taught[i]
            assert torch.equal(item["input_ids"], blocks[i]["input_ids"])
            assert (item["top_ids"].dtype, item["top_log_p"].dtype) == (torch.int32, torch.float16)
            assert told(item, teacher), i


def test_all_of_the_vocabulary_sums_to_one(teacher, files, tmp_path):
    made = write(teacher, files, tmp_path / "all.logits", top=64)
    item = TaughtBlocks(Blocks(files, LENGTH), made)[3]
    assert told(item, teacher, 64)
    assert torch.allclose(item["top_log_p"].float().exp().sum(-1), torch.ones(LENGTH), atol=2e-3)
    assert item["top_ids"].sort(-1).values.tolist() == [list(range(64))] * LENGTH


def test_taught_blocks_go_to_other_processes(teacher, files, tmp_path):
    taught = TaughtBlocks(Blocks(files, LENGTH, seed=1), write(teacher, files, tmp_path / "some.logits", top=64))
    expected = [taught[i] for i in range(12)]
    assert len(pickle.dumps(taught)) < 4000, "no answers are in it"
    loader = DataLoader(pickle.loads(pickle.dumps(taught)), 4, num_workers=2, multiprocessing_context="fork")
    got = [{name: rows[i] for name, rows in batch.items()} for batch in loader for i in range(4)]
    assert all(torch.equal(one[name], other[name]) for one, other in zip(got, expected, strict=True) for name in one)


class Says(torch.nn.Module):
    """A model that answers each block with the same logits [T, V], or says that it was asked."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)
        self.config = SimpleNamespace()

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.logits[: input_ids.shape[1]].expand(len(input_ids), -1, -1))


def test_wide_vocabularies_take_four_bytes_an_id(files, tmp_path):
    logits = torch.zeros(LENGTH, 65537)
    logits[:, 65536], logits[:, 3] = 5.0, 4.0
    for vocabulary, dtype, likeliest in ((65537, "uint32", 65536), (65536, "uint16", 3)):
        path = tmp_path / f"{vocabulary}.logits"
        made = write(Says(logits[:, :vocabulary]), files, path, top=1)
        assert (made.vocabulary, made.dtype) == (vocabulary, dtype)
        assert path.stat().st_size == 12 * LENGTH * {"uint32": 6, "uint16": 4}[dtype]
        assert set(TaughtBlocks(Blocks(files, LENGTH), made)[0]["top_ids"].flatten().tolist()) == {likeliest}


@pytest.mark.parametrize("never", [-1e9, -float("inf")])
def test_tokens_that_are_never_said_have_a_finite_logarithm(never, files, tmp_path):
    logits = torch.zeros(LENGTH, 4)
    logits[:, 1] = never
    made = write(Says(logits), files, tmp_path / "some.logits", top=4)
    log_p = TaughtBlocks(Blocks(files, LENGTH), made)[0]["top_log_p"]
    assert log_p[0].tolist() == [np.float16(np.log(1 / 3))] * 3 + [-65504.0]


def test_the_dtype_of_the_teacher_is_kept(teacher, files, tmp_path):
    assert write(teacher.bfloat16(), files, tmp_path / "some.logits").precision == "bfloat16"


def test_the_mode_of_the_teacher_comes_back(files, tmp_path):
    from tests.conftest import tiny_llama_config
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(tiny_llama_config(attention_dropout=0.5)).train()
    gradients = []
    model.register_forward_hook(lambda *_: gradients.append(torch.is_grad_enabled()))
    trained = write(model, files, tmp_path / "a.logits").path.read_bytes()
    assert model.training and not any(gradients)
    assert trained == write(model.eval(), files, tmp_path / "b.logits").path.read_bytes()


# --- killed


class Killed(BaseException):
    """What no handler of the code under test knows."""


@pytest.mark.parametrize("kill_at", [5, 10, 12])
def test_a_killed_run_goes_on_bit_for_bit(kill_at, teacher, files, tmp_path):
    whole = write(teacher, files, tmp_path / "whole.logits").path.read_bytes()
    path = tmp_path / "some.logits"

    def stop(done, total):
        if done == kill_at:
            raise Killed

    with pytest.raises(Killed):
        write(teacher, files, path, progress=stop)
    assert not path.exists()
    with pytest.raises(DataError, match=r"some\.logits.json: No such file.*when it is complete"):
        read_teacher_logits(path)
    partial = tmp_path / "some.logits.partial"
    assert partial.read_bytes() == whole[: kill_at * LENGTH * TOP * 4]
    with partial.open("ab") as stream:
        stream.write(b"\x07" * (LENGTH * TOP * 4 + 3))  # a block and a part of one, which the kill cut off
    seen = []
    made = write(teacher, files, path, progress=lambda *done: seen.append(done[0]))
    assert path.read_bytes() == whole
    assert seen == [done for done in (5, 10, 12) if done > kill_at], "what was done is not done again"
    assert not list(tmp_path.glob("some.logits.partial*"))
    # Once more: it is there.
    assert write(teacher, files, path, progress=lambda *done: pytest.fail("it asks again")) == made


def test_the_last_rename_may_be_what_a_kill_took(teacher, files, tmp_path):
    path = tmp_path / "some.logits"
    made = write(teacher, files, path)
    (tmp_path / "some.logits.partial.json").write_text(json.dumps({**made.recipe(), "done": 12}))
    path.rename(tmp_path / "some.logits.partial")
    assert write(teacher, files, path, progress=lambda *done: pytest.fail("it asks again")) == made


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"top": 4}, "top 5, not 4"),
        ({"batch": 3}, "batch 5, not 3"),
        ({"length": 4}, r"length 8, not 4"),
        ({"digest": "1" * 64}, r"\(teacher\)"),
        ({"files": 1}, r"\(files\)"),
        ({"precision": True}, "precision float32, not bfloat16"),
    ],
)
def test_another_run_is_not_gone_on_with(changes, what, finished, teacher, files, tmp_path):
    path = tmp_path / "some.logits"

    def stop(done, total):
        if not finished:
            raise Killed

    with contextlib.suppress(Killed):
        write(teacher, files, path, progress=stop)
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir() if entry.is_file()}
    changes = dict(changes)
    files = files[: changes.pop("files", 2)]
    teacher = teacher.bfloat16() if changes.pop("precision", False) else teacher
    with pytest.raises(DataError, match=rf"some\.logits(\.partial)? is another run's .*{what}.*; give another path"):
        write(teacher, files, path, **changes)
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir() if entry.is_file()} == before


def test_two_processes_do_not_write_one_file(teacher, files, tmp_path):
    path = tmp_path / "some.logits"

    def second(done, total):
        with pytest.raises(DataError, match=r"another process writes .*some\.logits\.partial"):
            write(teacher, files, path)

    write(teacher, files, path, progress=second)


# --- what does not fit


def test_what_cannot_be_written(teacher, files, tmp_path):
    path = tmp_path / "some.logits"
    for changes, kind, message in (
        ({"top": 0}, OptionError, "the top 0 tokens are asked for, of a vocabulary of 64; give 1 … 64"),
        ({"top": 65}, OptionError, "the top 65 tokens are asked for"),
        ({"batch": 0}, OptionError, "0 blocks a batch are asked for; a positive number"),
        ({"length": 1}, OptionError, "the length of a block is 1"),
        ({"length": 129}, DataError, "fewer than one block of 129"),
    ):
        with pytest.raises(kind, match=message):
            write(teacher, files, path, **changes)
    with pytest.raises(OptionError, match=r"some\.bin is no name of a file of teacher's logits; .* ends in \.logits"):
        write(teacher, files, tmp_path / "some.bin")
    with pytest.raises(DataError, match=r"cannot be written \(.*\); give another path"):
        write(teacher, files, tmp_path / "a.txt" / "some.logits")
    teacher.config.max_position_embeddings = 7
    with pytest.raises(OptionError, match="blocks of 8 tokens are asked for, but the model has 7 positions"):
        write(teacher, files, path)
    teacher.config.max_position_embeddings = 8
    assert not list(tmp_path.glob("some.*"))
    with torch.no_grad():
        teacher.model.norm.weight.fill_(float("nan"))
    with pytest.raises(WeightError, match="NaN or infinite"):
        write(teacher, files, path)
    assert not path.exists()


def test_what_is_damaged_is_not_read(teacher, files, tmp_path):
    path = tmp_path / "some.logits"
    write(teacher, files, path)
    whole, description = path.read_bytes(), tmp_path / "some.logits.json"
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"has 1919 bytes instead of 1920: it is not complete; make it anew"):
        read_teacher_logits(path)
    path.write_bytes(whole)
    values = json.loads(description.read_text())
    for content, message in (
        ("{}", "does not describe a file of teacher's logits"),
        ("[", "does not describe a file of teacher's logits"),
        (json.dumps({**values, "other": 1}), "does not describe a file of teacher's logits"),
        (json.dumps({**values, "format": 2}), "has format 2, this signbit reads 1"),
    ):
        description.write_text(content)
        with pytest.raises(DataError, match=message):
            read_teacher_logits(path)
    with pytest.raises(OptionError, match=r"ends in \.logits"):
        read_teacher_logits(files[0].path)


def test_what_another_run_would_learn_from_is_refused(teacher, files, tokenizer, tmp_path):
    made = write(teacher, files[:1], tmp_path / "some.logits")
    made.check("0" * 64, files[0].tokenizer, LENGTH)
    with pytest.raises(DataError, match=r"some\.logits was made with another tokenizer than the model's; make it anew"):
        made.check("0" * 64, "1" * 64, LENGTH)
    with pytest.raises(DataError, match=r"some\.logits holds what another model answers; make it anew"):
        made.check("1" * 64, files[0].tokenizer, LENGTH)
    with pytest.raises(
        DataError, match=r"answers blocks of 8 tokens, and --sequence-length is 4; give --sequence-length 8, or make it"
    ):
        made.check("0" * 64, files[0].tokenizer, 4)
    with pytest.raises(DataError, match=rf"has no answers to .*b\.txt .*, but to {files[0].path.name}; make it anew"):
        TaughtBlocks(Blocks(files, LENGTH), made)


def test_a_file_of_tokens_is_known_by_its_content(teacher, tokenizer, tmp_path):
    """Its name may be anybody's: own.tokens is another text when it is made anew."""
    path = tmp_path / "own.tokens"
    first = self_generate(teacher, tokenizer, path, 4, LENGTH)
    made = write(teacher, [first], tmp_path / "some.logits")
    moved = copy.copy(first)
    path.rename(tmp_path / "moved.tokens")
    path.with_name("own.tokens.json").rename(tmp_path / "moved.tokens.json")
    moved = read_token_file(tmp_path / "moved.tokens")
    assert told(TaughtBlocks(Blocks([moved], LENGTH), made)[2], teacher)
    second = self_generate(teacher, tokenizer, path, 4, LENGTH, seed=1)
    assert second.tokens == first.tokens
    with pytest.raises(DataError, match=r"has no answers to .*own\.tokens\)"):
        TaughtBlocks(Blocks([second], LENGTH), made)
