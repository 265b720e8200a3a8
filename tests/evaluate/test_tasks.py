"""Tasks: prompts against lm-eval's own, numbers against its `hf` model, and answers that survive a kill."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml

from signbit.cli import main
from signbit.errors import DataError, OptionError, WeightError
from signbit.evaluate.requests import Group, Question, Requests, Task, read_requests
from signbit.evaluate.scoring import Answers, Encoder, answers_path, positions, score
from signbit.evaluate.tasks import counted, results
from signbit.hub.subject import model_digests

#: A row of each task as the hub has it, its prompts as lm-eval 0.4.13 makes them, and the place of the right one.
ROWS = {
    "piqa": (
        "piqa/validation.jsonl",
        {
            "goal": "dresser",
            "sol1": "replace drawer with bobby pin ",
            "sol2": "finish, woodgrain with  bobby pin ",
            "label": 1,
        },
        [
            ("Question: dresser\nAnswer:", " replace drawer with bobby pin "),
            ("Question: dresser\nAnswer:", " finish, woodgrain with  bobby pin "),
        ],
        1,
    ),
    "winogrande": (
        "winogrande/validation.jsonl",
        {
            "sentence": "Sarah was a much better surgeon than Maria so _ always got the easier cases.",
            "option1": "Sarah",
            "option2": "Maria",
            "answer": "2",
        },
        [
            ("Sarah was a much better surgeon than Maria so Sarah", " always got the easier cases."),
            ("Sarah was a much better surgeon than Maria so Maria", " always got the easier cases."),
        ],
        1,
    ),
    "hellaswag": (
        "hellaswag/validation.jsonl",
        {
            "ind": 24,
            "activity_label": "Roof shingle removal",
            "ctx_a": "A man is [step] sitting on a roof.",
            "ctx_b": "he",
            "ctx": "A man is sitting on a roof. he",
            "endings": [
                "is using wrap to wrap a pair of skis.",
                "is ripping level tiles off. [title] Next",
                "is holding a rubik's cube.",
                "starts pulling up roofing on a roof.",
            ],
            "label": "3",
        },
        [
            ("Roof shingle removal: A man is sitting on a roof. He", " is using wrap to wrap a pair of skis."),
            ("Roof shingle removal: A man is sitting on a roof. He", " is ripping level tiles off.. Next"),
            ("Roof shingle removal: A man is sitting on a roof. He", " is holding a rubik's cube."),
            ("Roof shingle removal: A man is sitting on a roof. He", " starts pulling up roofing on a roof."),
        ],
        3,
    ),
    "boolq": (
        "boolq/validation_superglue.jsonl",
        {
            "passage": "Ethanol fuel -- All biomass is grown.",
            "question": "does ethanol take more energy",
            "idx": 0,
            "label": 0,
        },
        [
            ("Ethanol fuel -- All biomass is grown.\nQuestion: does ethanol take more energy?\nAnswer:", " no"),
            ("Ethanol fuel -- All biomass is grown.\nQuestion: does ethanol take more energy?\nAnswer:", " yes"),
        ],
        0,
    ),
    "arc_easy": (
        "arc_easy/test.jsonl",
        {
            "id": "M",
            "question": "Which equipment keeps mold out?",
            "choices": {"text": ["safety goggles", "breathing mask", "rubber gloves"], "label": ["1", "2", "3"]},
            "answerKey": "2",
        },
        [
            ("Question: Which equipment keeps mold out?\nAnswer:", " safety goggles"),
            ("Question: Which equipment keeps mold out?\nAnswer:", " breathing mask"),
            ("Question: Which equipment keeps mold out?\nAnswer:", " rubber gloves"),
        ],
        1,
    ),
    "arc_challenge": (
        "arc_challenge/test.jsonl",
        {
            "id": "M",
            "question": "What comes faster?",
            "choices": {"text": ["Days", "Years"], "label": ["A", "B"]},
            "answerKey": "A",
        },
        [("Question: What comes faster?\nAnswer:", " Days"), ("Question: What comes faster?\nAnswer:", " Years")],
        0,
    ),
    "openbookqa": (
        "openbookqa/test.jsonl",
        {
            "id": "8-343",
            "question_stem": "There is most likely going to be fog around:",
            "choices": {"text": ["a marsh", "a tundra"], "label": ["A", "B"]},
            "answerKey": "A",
        },
        [
            ("There is most likely going to be fog around:", " a marsh"),
            ("There is most likely going to be fog around:", " a tundra"),
        ],
        0,
    ),
    "lambada_openai": (
        "lambada/test.jsonl",
        {"text": "She opened the door and said hello to Gabriel"},
        [("She opened the door and said hello to", " Gabriel")],
        None,
    ),
    "storycloze_2016": (
        "storycloze_2016/test.jsonl",
        {
            **{f"input_sentence_{i}": f"Sentence {i}." for i in range(1, 5)},
            "sentence_quiz1": "It ends.",
            "sentence_quiz2": "It goes on.",
            "answer_right_ending": 2,
        },
        [
            ("Sentence 1. Sentence 2. Sentence 3. Sentence 4.", " It ends."),
            ("Sentence 1. Sentence 2. Sentence 3. Sentence 4.", " It goes on."),
        ],
        1,
    ),
    "wsc273": (
        "wsc273/test.jsonl",
        {
            "text": "The fish ate the worm. It was tasty.",
            "pronoun": "It",
            "pronoun_loc": 23,
            "options": ["The fish", "The worm"],
            "label": 1,
        },
        [
            ("The fish ate the worm. The fish", "  was tasty."),  # lm-eval puts a blank before the text's own
            ("The fish ate the worm. The worm", "  was tasty."),
        ],
        1,
    ),
    "mmlu_anatomy": (
        "mmlu/anatomy/test.jsonl",
        {"question": " A lesion causes \n", "choices": ["a", "b", "c", "d"], "answer": 2, "subject": "anatomy"},
        [
            (
                "The following are multiple choice questions (with answers) about anatomy.\n\n"
                "A lesion causes\nA. a\nB. b\nC. c\nD. d\nAnswer:",
                f" {letter}",
            )
            for letter in "ABCD"
        ],
        2,
    ),
}


def write_rows(directory, place, rows):
    file = directory / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def rows_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("rows")
    for place, row, _, _ in ROWS.values():
        write_rows(directory, place, [row])
    return directory


def harness_task(name, files, folder):
    """A task as lm-eval itself loads it, its own configuration included, from files of JSON."""
    from signbit.evaluate.harness import _manager

    entry = _manager([name]).task_index[name]
    kept = {key: entry.cfg.get(key) for key in ("training_split", "validation_split", "test_split", "fewshot_split")}
    config = {
        "include": str(entry.yaml_path),
        "task": f"{name}_own",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(file) for split, file in files.items()}},
        **{key: split if split in files else None for key, split in kept.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}_own.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture
def datasets_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def test_prompts_from_local_rows_are_those_of_the_harness(rows_dir):
    from signbit.evaluate.harness import harness_requests

    asked = harness_requests(list(ROWS), rows_dir)
    assert asked.harness == "lm-eval 0.4.13"
    assert [task.name for task in asked.tasks] == list(ROWS)
    for question, task, (name, (place, _, pairs, gold)) in zip(asked.questions, asked.tasks, ROWS.items(), strict=True):
        assert (question.task, list(question.pairs)) == (name, pairs)
        assert question.gold == (() if gold is None else (gold,))
        assert task.source == str(rows_dir / place)
        if gold is not None and name not in ("winogrande", "wsc273"):
            assert question.lengths == tuple(len(continuation) - 1 for _, continuation in pairs)


def test_rows_may_be_packed_or_parquet(tmp_path):
    import gzip

    import pyarrow
    import pyarrow.parquet

    from signbit.evaluate.harness import harness_requests

    _, row, pairs, _ = ROWS["piqa"]
    file = write_rows(tmp_path, "piqa/validation.jsonl", [row])
    file.with_name("validation.jsonl.gz").write_bytes(gzip.compress(file.read_bytes()))
    file.unlink()
    assert list(harness_requests(["piqa"], tmp_path).questions[0].pairs) == pairs
    file.with_name("validation.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match="is damaged, or not packed as its name says"):
        harness_requests(["piqa"], tmp_path)
    file.with_name("validation.jsonl.gz").unlink()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), file.with_name("validation.parquet"))
    assert list(harness_requests(["piqa"], tmp_path).questions[0].pairs) == pairs
    file.with_name("validation.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"piqa could not be read from .*validation\.parquet"):
        harness_requests(["piqa"], tmp_path)


def test_examples_in_prompts_are_those_that_lm_eval_draws(tmp_path, datasets_cache):
    import lm_eval.tasks

    from signbit.evaluate.harness import harness_requests

    rows = [{"goal": f"goal {i}", "sol1": f"one {i}", "sol2": f"two {i}", "label": i % 2} for i in range(9)]
    files = {split: write_rows(tmp_path, f"piqa/{split}.jsonl", rows) for split in ("train", "validation")}
    asked = harness_requests(["piqa"], tmp_path, few_shot=3, limit=4)
    assert asked.tasks[0].few_shot == 3 and (len(asked.questions), asked.tasks[0].documents) == (4, 9)
    assert asked.questions[0].pairs[0][0].count("Question: ") == 4
    harness_task("piqa", files, tmp_path / "own")
    own = lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(tmp_path / "own")).load(["piqa_own"])
    task = own["tasks"]["piqa_own"]
    task.set_config(key="num_fewshot", value=3)
    task.set_fewshot_seed(1234)
    task.build_all_requests(limit=4, rank=0, world_size=1)
    assert [pair for q in asked.questions for pair in q.pairs] == [instance.args for instance in task.instances]
    (tmp_path / "piqa/train.jsonl").unlink()
    with pytest.raises(DataError, match=r"no file for train of piqa \(its 3 examples a prompt come from there\)"):
        harness_requests(["piqa"], tmp_path, few_shot=3)
    assert harness_requests(["piqa"], tmp_path).questions[0].pairs[0][0].count("Question: ") == 1


def test_mmlu_has_its_categories_and_a_missing_subject_is_named(stories, tmp_path, monkeypatch, capsys):
    from signbit.evaluate import harness

    groups = []
    members = harness._expand(harness._manager(["mmlu"]), "mmlu", groups)
    assert [group.name for group in groups] == [
        "mmlu", "mmlu_stem", "mmlu_other", "mmlu_social_sciences", "mmlu_humanities",
    ]  # fmt: skip
    assert [len(group.tasks) for group in groups] == [57, 19, 13, 12, 13]
    assert all(group.weighted and group.metrics == ("acc",) for group in groups)
    subjects = [member["task"].removeprefix("mmlu_") for member in members]
    for number, subject in enumerate(subjects[:-1]):
        row = {**ROWS["mmlu_anatomy"][1], "answer": number % 4, "subject": subject}
        write_rows(tmp_path, f"mmlu/{subject}/test.jsonl", [row] * (1 + number % 3))
    last = subjects[-1]
    with pytest.raises(DataError, match=rf"no file for test of mmlu_{last}; it is looked for as mmlu/{last}/test\{{"):
        harness.harness_requests(["mmlu"], tmp_path)
    write_rows(tmp_path, f"mmlu/{last}/test.jsonl", [ROWS["mmlu_anatomy"][1]])
    monkeypatch.setenv("SIGNBIT_CACHE", str(tmp_path / "cache"))
    found, printed = evaluated(
        ["eval", stories, "--tasks", "mmlu,mmlu_stem", "--data-dir", str(tmp_path)], tmp_path / "mmlu.json", capsys
    )
    results = {result["name"]: result for result in found["tasks"][0]["results"]}
    assert len(found["tasks"][0]["results"]) == len(results) == 5 + 57  # mmlu_stem once
    assert "57 lines of single tasks are in the file of --json" in printed.out and "mmlu_humanities" in printed.out
    for group in groups:
        right = sum(results[task]["values"]["acc"] * results[task]["documents"] for task in group.tasks)
        documents = sum(results[task]["documents"] for task in group.tasks)
        assert results[group.name]["documents"] == documents
        assert results[group.name]["values"]["acc"] == pytest.approx(right / documents)
        assert results[group.name]["chance"] == 0.25


@pytest.fixture(scope="module")
def limited(shared):
    """Requests for the first documents of the shared files."""
    from signbit.evaluate.harness import harness_requests

    return harness_requests(["piqa", "arc_easy", "winogrande", "openbookqa"], shared / "data", limit=6)


def load(stories):
    from signbit.hub.load import load_any, load_tokenizer

    return load_any(stories), load_tokenizer(stories)


def pairs_of(requests):
    return [pair for question in requests.questions for pair in question.pairs]


def test_numbers_are_those_of_lm_eval_with_its_hf_model(limited, shared, stories, tmp_path, datasets_cache):
    import lm_eval
    import lm_eval.tasks

    files = {"piqa": "validation", "arc_easy": "test", "winogrande": "validation", "openbookqa": "test"}
    for name, split in files.items():
        harness_task(name, {split: shared / "data" / name / f"{split}.jsonl"}, tmp_path / "own")
    own = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": stories, "dtype": "float32"},
        tasks=[f"{name}_own" for name in files],
        limit=6,
        device="cpu",
        batch_size=4,
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(tmp_path / "own")),
        bootstrap_iters=10,
    )
    model, tokenizer = load(stories)
    scored = score(model, Encoder(tokenizer), pairs_of(limited))
    for result in results(limited, scored.answers):
        theirs = own["results"][f"{result.name}_own"]
        for metric, value in result.values.items():
            assert value == theirs[f"{metric},none"], (result.name, metric)
            assert result.stderr[metric] == theirs[f"{metric}_stderr,none"], (result.name, metric)
    assert {task.name: task.metrics for task in limited.tasks}["piqa"] == ("acc", "acc_norm")
    by_task = {name: iter(sorted(own["samples"][f"{name}_own"], key=lambda s: s["doc_id"])) for name in files}
    for question in limited.questions:
        sample = next(by_task[question.task])
        assert list(question.pairs) == [tuple(pair) for pair in sample["arguments"]]
        ours = [scored.answers[pair] for pair in question.pairs]
        theirs = [tuple(answer) for answer in sample["filtered_resps"]]
        assert [a[0] for a in ours] == pytest.approx([t[0] for t in theirs], rel=1e-5)
        assert [a[1] for a in ours] == [t[1] for t in theirs]


@pytest.mark.parametrize("bos", ["tokenizer", "yes", "no"])
def test_texts_become_the_tokens_that_lm_eval_makes(stories, bos):
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = load(stories)
    their = HFLM(
        pretrained=model, tokenizer=tokenizer, add_bos_token={"tokenizer": None, "yes": True, "no": False}[bos]
    )
    encoder = Encoder(tokenizer, bos)
    pairs = [("Once upon a", " time there"), ("Once upon a ", "time"), ("<s>Once", " upon"), ("a\n", " b c")]
    assert encoder(pairs) == [their._encode_pair(*pair) for pair in pairs]
    before, alone = encoder([("", "Once upon")])[0]
    assert before == [tokenizer.bos_token_id] == [their.prefix_token_id]
    assert alone == their.tok_encode("Once upon", add_special_tokens=False)
    whole = their.tok_encode("<s>Once", add_special_tokens=False)
    assert encoder([("", "<s>Once")])[0] == (whole[:1], whole[1:]) and whole[0] == their.prefix_token_id
    assert encoder.described() == ("nothing before a prompt" if bos == "no" else "<s> before each prompt")
    assert positions(model, tokenizer) == their.max_length == 512


def test_a_context_longer_than_the_model_is_cut_on_the_left_as_lm_eval_cuts_it(stories):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = load(stories)
    pairs = [("Lily had a dog. " * 200 + "She", " was happy"), ("The dog", " ran")]
    scored = score(model, Encoder(tokenizer), pairs)
    assert scored.truncated == 1
    their = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    expected = their.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs], disable_tqdm=True)
    assert [scored.answers[pair][0] for pair in pairs] == pytest.approx([e[0] for e in expected], rel=1e-5)


class Counting(torch.nn.Module):
    """A model that counts its calls, and fails as told."""

    def __init__(self, inner, fails=lambda call, ids: None):
        super().__init__()
        self.inner, self.fails, self.calls = inner, fails, []
        self.config = inner.config

    def forward(self, input_ids, use_cache, logits_to_keep=0):
        self.fails(len(self.calls), input_ids)
        self.calls.append(tuple(input_ids.shape))
        return self.inner(input_ids=input_ids, use_cache=use_cache, logits_to_keep=logits_to_keep)


def test_a_run_that_was_stopped_goes_on_without_asking_again(limited, stories, tmp_path):
    model, tokenizer = load(stories)
    encoder, pairs, path = Encoder(tokenizer), pairs_of(limited), tmp_path / "answers"
    whole = Counting(model)
    expected = score(whole, encoder, pairs).answers
    assert len(whole.calls) > 3

    def stop(call, ids):
        if call == 2:
            raise KeyboardInterrupt

    stopped = Counting(model, stop)
    with pytest.raises(KeyboardInterrupt):
        score(stopped, encoder, pairs, Answers(path))
    with (tmp_path / "answers-0.jsonl").open("a") as stream:
        stream.write('\n["half a li')
    goes_on = Counting(model)
    scored = score(goes_on, encoder, pairs, Answers(path))
    assert scored.answers == expected
    assert stopped.calls + goes_on.calls == whole.calls
    assert scored.known > 0
    assert Answers(path).machines(pairs) == [{}], "nobody said which"
    again = Counting(model)
    assert score(again, encoder, pairs, Answers(path)).answers == expected
    assert again.calls == []


def test_answers_are_kept_with_the_machine_that_gave_them(tmp_path):
    path, (a, b, c) = tmp_path / "answers", [("text", f" {word}") for word in "abc"]
    Answers(path, 0, {"device": "one"}).add({a: (-1.0, True)})
    other = Answers(path, 0, {"device": "another"})
    other.add({b: (-2.0, False)})
    assert other.machines([a, b]) == [{"device": "one"}, {"device": "another"}]
    with (tmp_path / "answers-0.jsonl").open("a") as stream:
        stream.write(
            '\n7\nnull\n"abc"\n[1, 2, 3]\n["k", [], true]\n{"measured_on": 7}\n{"x": 1}\n{"measured_on": {"dev'
        )
    third = Answers(path, 0, {"device": "third"})
    assert (third.get(a), third.get(b)) == ((-1.0, True), (-2.0, False)) and third.machines([b]) == [
        {"device": "another"}
    ]
    assert third.machines([c]) == [{"device": "third"}], "a process beside this one gave it"


def test_memory_that_runs_out_halves_the_batch_and_changes_no_answer(limited, stories):
    model, tokenizer = load(stories)

    def fails(call, ids):
        if ids.numel() > 700:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    pairs = pairs_of(limited)
    small = Counting(model, fails)
    scored = score(small, Encoder(tokenizer), pairs)
    expected = score(model, Encoder(tokenizer), pairs).answers
    assert scored.batch_tokens <= 1024 and all(rows * length <= 700 for rows, length in small.calls)
    assert list(scored.answers) == list(expected)
    for pair, (logprob, greedy) in scored.answers.items():
        assert (logprob, greedy) == (pytest.approx(expected[pair][0], rel=1e-5), expected[pair][1])
    with pytest.raises(OptionError, match="memory does not suffice for one text of"):
        score(Counting(model, lambda call, ids: fails(call, torch.zeros(1000))), Encoder(tokenizer), pairs)


def test_each_process_scores_its_share_of_the_batches(limited, stories, monkeypatch):
    model, tokenizer = load(stories)
    pairs = pairs_of(limited)
    whole = Counting(model)
    expected = score(whole, Encoder(tokenizer), pairs).answers
    parts = []
    monkeypatch.setattr("signbit.evaluate.scoring.gather_object", lambda found: parts.append(dict(found[0])) or parts)
    counts = [Counting(model), Counting(model)]
    with pytest.raises(KeyError):  # the first is alone when it gathers here
        score(counts[0], Encoder(tokenizer), pairs, processes=(0, 2))
    assert score(counts[1], Encoder(tokenizer), pairs, processes=(1, 2)).answers == expected
    assert sorted(counts[0].calls + counts[1].calls) == sorted(whole.calls)
    assert not parts[0].keys() & parts[1].keys()


def test_logits_that_are_nan_are_an_error(stories):
    model, tokenizer = load(stories)
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(WeightError, match="logits are NaN"):
        score(model, Encoder(tokenizer), [("a", " b")])
    with pytest.raises(OptionError, match="has 0 tokens"):
        score(model, Encoder(tokenizer), [("a", "")])


def test_a_known_model_answers_the_known_logarithms(tokenizer):
    """p(t + 1 | t) = 3/4: the answer is Σ ln p, and greedy where each token follows."""
    table = torch.full((64, 64), 0.25 / 63)
    table[torch.arange(64), (torch.arange(64) + 1) % 64] = 0.75

    class Known(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.config = SimpleNamespace(max_position_embeddings=32)

        def forward(self, input_ids, use_cache):
            return SimpleNamespace(logits=table.log()[input_ids])

    follows, not_all = ("w3 w4", " w5 w6"), ("w9", " w10 w12 w13")
    scored = score(Known(), Encoder(tokenizer), [follows, not_all]).answers
    assert scored[follows] == (pytest.approx(2 * math.log(0.75)), True)
    assert scored[not_all] == (pytest.approx(2 * math.log(0.75) + math.log(0.25 / 63), rel=1e-6), False)


def test_counting_and_its_errors():
    question = Question("t", 0, (("c", " a"), ("c", " bb"), ("c", " cc")), (1,), (1, 2, 2))
    assert counted(question, "choice", [(-2.0, True), (-3.0, False), (-3.0, False)]) == {"acc": 0.0, "acc_norm": 1.0}
    assert counted(question, "choice", [(-3.0, False), (-3.0, False), (-4.0, False)]) == {"acc": 0.0, "acc_norm": 1.0}
    one = Question("l", 0, (("c", " a"),))
    assert counted(one, "continuation", [(-1.5, True)]) == {"acc": 1.0, "perplexity": -1.5}


def made_requests(sizes, groups):
    tasks = tuple(Task(f"t{i}", "choice", ("acc",), 0, "1", size, "here") for i, size in enumerate(sizes))
    questions = tuple(
        Question(task.name, i, ((f"{task.name} {i}", "x"), (f"{task.name} {i}", "y")), (0,), (1, 1))
        for task in tasks
        for i in range(task.documents)
    )
    return Requests("made", None, tasks, groups, questions)


def test_means_of_groups_and_their_errors_are_lm_evals():
    from lm_eval.api.metrics import aggregate_subtask_metrics, mean_stderr, pooled_sample_stderr, unweighted_mean_stderr

    sizes = (3, 5, 8)
    groups = (
        Group("all", ("t0", "t1", "t2"), weighted=True),
        Group("suite", ("t0", "t1", "t2"), ("acc", "acc_norm"), suite=True),
    )
    requests = made_requests(sizes, groups)
    answers = {pair: (-1.0 - (i % 3), False) for i, pair in enumerate(p for q in requests.questions for p in q.pairs)}
    weighted, suite, *tasks = results(requests, answers)
    right = [
        [float(answers[q.pairs[0]] >= answers[q.pairs[1]]) for q in requests.questions if q.task == t.name]
        for t in tasks
    ]
    assert 0 < sum(map(sum, right)) < sum(sizes)
    assert [t.values["acc"] for t in tasks] == [sum(r) / len(r) for r in right]
    errors = [t.stderr["acc"] for t in tasks]
    assert errors == [mean_stderr(r) for r in right]
    assert weighted.values["acc"] == pytest.approx(
        aggregate_subtask_metrics([t.values["acc"] for t in tasks], sizes, True)
    )
    assert weighted.stderr["acc"] == pytest.approx(pooled_sample_stderr(errors, sizes))
    assert suite.values["acc"] == suite.values["acc_norm"] == pytest.approx(sum(t.values["acc"] for t in tasks) / 3)
    assert suite.stderr["acc"] == pytest.approx(unweighted_mean_stderr(errors))
    assert weighted.chance == suite.chance == 0.5 and weighted.documents == 16
    assert len({part.asked_sha256 for part in (weighted, *tasks)}) == 4
    assert results(requests, dict.fromkeys(answers, (0.0, True)))[2].asked_sha256 == tasks[0].asked_sha256
    for change in ({"pairs": (("t0 0", "x"), ("t0 0", "z"))}, {"gold": (1,)}, {"lengths": (1, 2)}):
        first, *rest = requests.questions
        changed = replace(requests, questions=(replace(first, **change), *rest))
        answers[("t0 0", "z")] = (-1.0, False)
        group, _, task, same, _ = results(changed, answers)
        assert group.asked_sha256 != weighted.asked_sha256 and task.asked_sha256 != tasks[0].asked_sha256, change
        assert same.asked_sha256 == tasks[1].asked_sha256
    single = results(made_requests((1,), ()), answers)[0]
    assert single.stderr == {"acc": None}


def test_requests_travel_in_a_file(rows_dir, tmp_path):
    from signbit.evaluate.harness import harness_requests

    asked = harness_requests(["zeroshot6", "lambada_openai"], rows_dir)
    assert asked.groups[-1].name == "zeroshot6" and asked.groups[-1].suite
    six = ("winogrande", "hellaswag", "piqa", "boolq", "arc_easy", "arc_challenge")
    assert asked.groups[-1].tasks == tuple(task.name for task in asked.tasks[:6]) == six
    for name in ("r.jsonl", "r.jsonl.gz"):
        asked.write(tmp_path / name)
        assert read_requests(tmp_path / name) == asked
    lines = (tmp_path / "r.jsonl").read_text().splitlines()
    for change, message in [
        (lines[1:], "holds no requests"),
        ([lines[0].replace('"signbit_requests": 1', '"signbit_requests": 2'), *lines[1:]], "is of format 2"),
        ([*lines[:2], lines[2].replace('"gold": [', '"gold": [9, ')], "line 3: .*gold"),
        (lines[:2], "no question of hellaswag"),
        ([lines[0], "{"], "line 2: not a JSON object"),
    ]:
        (tmp_path / "bad.jsonl").write_text("\n".join(change) + "\n")
        with pytest.raises(DataError, match=message):
            read_requests(tmp_path / "bad.jsonl")
    with pytest.raises(OptionError, match=r"let the name end in \.jsonl"):
        asked.write(tmp_path / "r.txt")


@pytest.mark.parametrize(
    ("line", "where", "value", "message"),
    [
        (1, ("tasks",), "t0", "tasks is 't0', not a list"),
        (1, ("tasks",), [], "tasks is empty"),
        (1, ("tasks", 0), "t0", "a task is an object, not 't0'"),
        (1, ("tasks", 1, "name"), "t0", "tasks: 't0' is there twice"),
        (1, ("tasks", 0, "name"), 5, "name of a task is 5, not a text"),
        (1, ("tasks", 0, "kind"), "guess", "kind of t0 is 'guess'; there are choice, continuation"),
        (1, ("tasks", 0, "documents"), "many", "documents of a task is 'many', not a whole number from 0"),
        (1, ("tasks", 0, "few_shot"), True, "few_shot of a task is True"),
        (1, ("tasks", 0, "metrics"), "acc", "metrics of a task is 'acc', not a list of texts"),
        (1, ("tasks", 0, "metrics"), ["acc", "foo"], "metrics of t0: 'foo' is none of acc, acc_norm"),
        (1, ("tasks", 0, "metrics"), [], "metrics of t0 is empty"),
        (1, ("tasks", 0, "shots"), 5, "'shots' is no field of a task, which has name, kind"),
        (1, ("groups",), None, "groups is None, not a list"),
        (1, ("groups", 0, "metrics"), 5, "metrics of a group is 5, not a list of texts"),
        (1, ("groups", 0, "metrics"), ["f1"], "metrics of all: 'f1' is none of acc"),
        (1, ("groups", 0, "tasks"), [], "tasks of all is empty"),
        (1, ("groups", 0, "tasks"), ["t0", "t9"], "tasks of all: 't9' is none of t0, t1"),
        (1, ("groups", 0, "name"), "t1", "tasks and groups: 't1' is there twice"),
        (1, ("groups", 0, "suite"), "no", "suite of a group is 'no', not true or false"),
        (1, ("harness",), None, "harness is None, not a text"),
        (1, ("limit",), 0, "limit is 0, not null or a whole number from 1"),
        (1, ("prompt_bos",), "maybe", "prompt_bos is 'maybe'; allowed are tokenizer, yes, no"),
        (2, (), [], r"a question is an object, not \[\]"),
        (2, (), {"task": "t0"}, "a question has no document, pairs"),
        (3, ("task",), "t9", "task is 't9', which is none of t0, t1"),
        (3, ("document",), 0, "document 0 of t0 is there twice"),
        (3, ("document",), 2, "document is 2, and t0 has 2"),
        (3, ("pairs",), [["a", "b"], ["a"]], "pairs of a question is .*, not a list of pairs of texts"),
        (3, ("pairs",), [["a", "b"], ["a", 1]], "pairs of a question is .*, not a list of pairs of texts"),
        (3, ("gold",), [], "gold is empty"),
        (3, ("gold",), [0, 0], "gold: 0 is there twice"),
        (3, ("gold",), [2], r"gold is \[2\], and there are 2 pairs"),
        (3, ("lengths",), ["a", "b"], "lengths of a question is .*, not a list of whole numbers from 0"),
        (3, ("lengths",), [1], "lengths: there are 1 for 2 pairs"),
        (6, ("pairs",), [["a", "b"], ["a", "c"]], "pairs: there are 2 in a task of kind continuation"),
    ],
)
def test_a_changed_file_of_requests_is_refused(line, where, value, message, tmp_path):
    asked = made_requests((2, 2), (Group("all", ("t0", "t1")),))
    spoken = Task("c", "continuation", ("acc", "perplexity"), 0, "1", 1, "here")
    asked = replace(
        asked, tasks=(*asked.tasks, spoken), questions=(*asked.questions, Question("c", 0, (("a", "b"),))), limit=2
    )
    file = tmp_path / "r.jsonl"
    asked.write(file)
    assert read_requests(file) == asked
    lines = [json.loads(text) for text in file.read_text().splitlines()]
    parent, *keys = [lines, line - 1, *where]
    for key in keys[:-1]:
        parent = parent[key]
    parent[keys[-1]] = value
    file.write_text("".join(json.dumps(value) + "\n" for value in lines))
    with pytest.raises(DataError, match=rf"r\.jsonl, line {line}: not as requests are written \({message}"):
        read_requests(file)


def test_what_stands_before_a_prompt_travels_with_the_requests(stories, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SIGNBIT_CACHE", str(tmp_path / "cache"))
    asked = made_requests((2,), ())
    for name, bos in (("no", "no"), ("open", None)):
        replace(asked, prompt_bos=bos).write(tmp_path / f"{name}.jsonl")
    head, *rest = (tmp_path / "open.jsonl").read_text().splitlines()
    old = {key: value for key, value in json.loads(head).items() if key != "prompt_bos"}
    (tmp_path / "old.jsonl").write_text("\n".join([json.dumps(old), *rest]) + "\n")
    found = {}
    for name, *flags in (("no",), ("no", "no"), ("open",), ("open", "no"), ("old",), ("old", "no")):
        command = ["eval", stories, "--requests", str(tmp_path / f"{name}.jsonl")]
        command += ["--prompt-bos", *flags] if flags else []
        (run,) = evaluated(command, tmp_path / "found.json", capsys)[0]["tasks"]
        found[(name, *flags)] = run["protocol"]["bos"] == "nothing before a prompt"
    assert [*found.values()] == [True, True, False, True, False, True]
    assert main(["eval", stories, "--requests", str(tmp_path / "no.jsonl"), "--prompt-bos", "yes"]) == 1
    assert (
        "no.jsonl was written for --prompt-bos no, and --prompt-bos says yes; leave that out" in capsys.readouterr().err
    )


def test_a_document_without_a_right_choice_is_refused(tmp_path):
    from signbit.evaluate.harness import harness_requests

    place, row, _, _ = ROWS["piqa"]
    write_rows(tmp_path, place, [row, {**row, "label": -1}])
    with pytest.raises(DataError, match="piqa, document 1: none of its choices is the right one"):
        harness_requests(["piqa"], tmp_path)


def test_both_tasks_of_lambada_need_files_of_their_own(tmp_path):
    from signbit.evaluate.harness import harness_requests

    place, row, _, _ = ROWS["lambada_openai"]
    write_rows(tmp_path, place, [row])
    with pytest.raises(
        DataError,
        match=r"test of lambada_standard; it is looked for as lambada_standard/test\{.*; lambada names several tasks, each",
    ):
        harness_requests(["lambada"], tmp_path)
    write_rows(tmp_path, "lambada_standard/test.jsonl", [{"text": row["text"].lower()}])
    openai, standard = harness_requests(["lambada"], tmp_path).questions
    assert (openai.task, standard.task) == ("lambada_openai", "lambada_standard")
    assert standard.pairs != openai.pairs


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("eval --tasks piqa --data-dir {rows}", "give the MODEL to measure"),
        pytest.param(
            "eval {llama} --tasks piqaa --data-dir {rows}",
            "lm-eval has no task piqaa; near it: piqa",
            marks=pytest.mark.slow,
        ),
        ("eval {llama} --tasks , --data-dir {rows}", "--tasks names nothing to measure"),
        ("eval {llama} --tasks piqa --limit 0 --data-dir {rows}", "--limit is 0"),
        ("eval {llama} --tasks piqa --few-shot -1 --data-dir {rows}", "--few-shot is -1"),
        ("eval {llama} --tasks piqa --data-dir {rows}/none", "is no directory"),
        ("eval {llama} --tasks piqa --data-dir {tmp}", "has no file for validation of piqa; it is looked for as piqa/"),
        ("eval {llama} --tasks piqa --data-dir {bad}", "its rows must be those of the hub's data set"),
        ("eval {llama} --limit 3", "--few-shot and --limit are for --tasks"),
        ("eval {llama} --requests {tmp}/none.jsonl", "is no file; make one where lm-eval is"),
        ("eval {llama} --requests a --tasks piqa", "give one of them"),
        ("eval {llama} --tasks piqa --export-requests {tmp}/r.jsonl", "leave MODEL and --ppl out"),
        (
            "eval {llama} --tasks cb --data-dir {bad}",
            "cb counts acc, f1 from multiple_choice, and signbit eval counts acc",
        ),
        ("eval --export-requests {tmp}/r.jsonl", "--export-requests writes what --tasks ask"),
        ("eval --tasks piqa --data-dir {rows} --export-requests {tmp}/no/r.jsonl", "cannot be written"),
    ],
)
def test_errors_say_what_to_do(command, message, llama_dir, rows_dir, tmp_path, capsys):
    write_rows(tmp_path / "bad", "piqa/validation.jsonl", [{"text": "no goal"}])
    write_rows(tmp_path / "bad", "cb/validation.jsonl", [{"premise": "a", "hypothesis": "b", "idx": 0, "label": 1}])
    places = {"llama": llama_dir, "rows": rows_dir, "tmp": tmp_path, "bad": tmp_path / "bad"}
    assert main(command.format(**places).split()) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and err.startswith("signbit: ")


def evaluated(argv, file, capsys):
    assert main([*argv, "--json", str(file)]) == 0
    return json.loads(file.read_text()), capsys.readouterr()


def test_the_command_shows_protocol_and_chance_and_asks_once(
    rows_dir, llama_dir, stories, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("SIGNBIT_CACHE", str(tmp_path / "cache"))
    command = ["eval", stories, "--tasks", "zeroshot7", "--data-dir", str(rows_dir), "--against", llama_dir]
    first, printed = evaluated(command, tmp_path / "a.json", capsys)
    assert "lm-eval 0.4.13; <s> before each prompt; float32, exact activations, cpu" in " ".join(printed.out.split())
    assert "a mean of acc_norm counts the acc of tasks without it" in printed.out and "33.3%" in printed.out
    assert first["results"] == []
    run = first["tasks"][0]
    assert [r["name"] for r in run["results"]] == ["zeroshot7", *run["results"][0]["tasks"]]
    assert (run["texts"], run["texts_from_disk"]) == (17, 0)
    chances = {r["name"]: r["chance"] for r in run["results"]}
    assert (chances["arc_easy"], chances["hellaswag"], chances["boolq"]) == (1 / 3, 1 / 4, 1 / 2)
    again, _ = evaluated(command, tmp_path / "b.json", capsys)
    assert [r["texts_from_disk"] for r in again["tasks"]] == [17, 17]
    assert [r["results"] for r in again["tasks"]] == [r["results"] for r in first["tasks"]]
    assert again["tasks"][0]["answers"] != again["tasks"][1]["answers"]
    no_bos, _ = evaluated([*command[:-2], "--prompt-bos", "no"], tmp_path / "c.json", capsys)
    assert no_bos["tasks"][0]["texts_from_disk"] == 0
    assert no_bos["tasks"][0]["protocol"]["bos"] == "nothing before a prompt"


def test_a_packed_model_is_asked_in_both_modes_of_activations(rows_dir, stories, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SIGNBIT_CACHE", str(tmp_path / "cache"))
    out = str(tmp_path / "packed")
    assert main(["quantize", stories, "-o", out, "--method", "absmean", "--group", "4"]) == 0
    command = ["eval", out, "--tasks", "piqa,lambada_openai", "--data-dir", str(rows_dir), "--activations"]
    runs = [evaluated([*command, mode], tmp_path / f"{mode}.json", capsys)[0]["tasks"][0] for mode in ("exact", "int8")]
    assert [run["protocol"]["activations"] for run in runs] == ["exact", "int8"]
    assert [run["texts_from_disk"] for run in runs] == [0, 0]
    exact, int8 = (run["results"][-1]["values"]["perplexity"] for run in runs)
    assert exact != int8 and int8 == pytest.approx(exact, rel=0.2)
    model, tokenizer = load(out)
    pair = ROWS["lambada_openai"][2][0]
    assert exact == pytest.approx(math.exp(-score(model, Encoder(tokenizer), [pair]).answers[pair][0]), rel=1e-5)


#: Runs the command line where neither lm-eval nor datasets can be imported.
WITHOUT = (
    "import sys\nfor name in ('lm_eval', 'datasets'): sys.modules[name] = None\n"
    "from signbit.cli import main\nsys.exit(main(sys.argv[1:]))\n"
)


def test_a_machine_without_lm_eval_gives_the_same_numbers(rows_dir, stories, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SIGNBIT_CACHE", str(tmp_path / "cache"))
    tasks = ["--tasks", "zeroshot7,lambada_openai", "--data-dir", str(rows_dir)]
    assert main(["eval", *tasks, "--export-requests", str(tmp_path / "r.jsonl.gz")]) == 0
    assert "8 documents of 8 tasks, 18 texts to score, by lm-eval 0.4.13" in " ".join(capsys.readouterr().out.split())
    here, _ = evaluated(["eval", stories, *tasks], tmp_path / "here.json", capsys)
    command = ["eval", stories, "--requests", str(tmp_path / "r.jsonl.gz"), "--json", str(tmp_path / "there.json")]
    env = {**os.environ, "SIGNBIT_CACHE": str(tmp_path / "other")}
    subprocess.run([sys.executable, "-c", WITHOUT, *command], env=env, check=True, capture_output=True)
    there = json.loads((tmp_path / "there.json").read_text())
    assert there["tasks"][0]["texts_from_disk"] == 0
    assert there["tasks"][0]["results"] == here["tasks"][0]["results"]
    assert there["tasks"][0]["model_sha256"] == here["tasks"][0]["model_sha256"]
    refused = subprocess.run(
        [sys.executable, "-c", WITHOUT, "eval", stories, *tasks], env=env, check=False, capture_output=True, text=True
    )
    assert refused.returncode == 1 and "lm-eval, which is not installed here" in refused.stderr
    assert "Traceback" not in refused.stderr


STORY = "Once upon a time there was a little girl who had a dog and a red ball to play with"


def many_requests(file, documents=600):
    words = STORY.split()
    task = Task("made", "choice", ("acc",), 0, "1", documents, "here")

    def choices(i):
        context = " ".join(words[i % 7 :] * (1 + i % 9)) + f" {i}"
        return tuple((context, f" {words[(i + step) % len(words)]}") for step in range(4))

    questions = tuple(Question("made", i, choices(i), (i % 3,), (1,) * 4) for i in range(documents))
    Requests("made", None, (task,), (), questions).write(file)


def test_a_killed_command_goes_on_where_it_was(stories, tmp_path, monkeypatch, capsys):
    many_requests(tmp_path / "r.jsonl")
    monkeypatch.setenv("SIGNBIT_CACHE", str(tmp_path / "cache"))
    command = ["eval", stories, "--requests", str(tmp_path / "r.jsonl")]
    process = subprocess.Popen([sys.executable, "-m", "signbit", *command], env=dict(os.environ))
    folder, deadline = tmp_path / "cache" / "answers", time.monotonic() + 120
    while (
        not any(file.stat().st_size for file in folder.glob("*.jsonl"))
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    written = sum(line.endswith("]") for file in folder.glob("*.jsonl") for line in file.read_text().splitlines())
    assert 0 < written < 2400
    went_on, _ = evaluated(command, tmp_path / "a.json", capsys)
    assert went_on["tasks"][0]["texts_from_disk"] == written
    monkeypatch.setenv("SIGNBIT_CACHE", str(tmp_path / "fresh"))
    fresh, _ = evaluated(command, tmp_path / "b.json", capsys)
    assert fresh["tasks"][0]["texts_from_disk"] == 0
    assert went_on["tasks"][0]["results"] == fresh["tasks"][0]["results"]


@pytest.mark.parametrize(("requests", "code"), [("asked.jsonl", 0), ("none.jsonl", 1)])
def test_processes_leave_their_group_at_the_end(requests, code, llama_dir, tmp_path, monkeypatch):
    left = []
    state = SimpleNamespace(
        num_processes=1, process_index=0, local_process_index=0, destroy_process_group=lambda: left.append(1)
    )
    monkeypatch.setattr("accelerate.PartialState", lambda **_: state)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("SIGNBIT_CACHE", str(tmp_path / "cache"))
    task = Task("made", "choice", ("acc",), 0, "1", 1, "here")
    question = Question("made", 0, (("w1", " w2"), ("w1", " w3")), (0,), (1, 1))
    Requests("made", None, (task,), (), (question,)).write(tmp_path / "asked.jsonl")
    assert main(["eval", llama_dir, "--requests", str(tmp_path / requests)]) == code
    assert left == [1]


def test_answers_belong_to_all_files_of_a_model_and_of_the_one_beside_an_adapter(llama_dir, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": llama_dir}))
    paths = {answers_path(model_digests(name), {}) for name in (llama_dir, str(adapter))}
    with open(f"{llama_dir}/model.safetensors", "ab") as stream:
        stream.write(b"one byte more")
    paths |= {answers_path(model_digests(name), {}) for name in (llama_dir, str(adapter))}
    paths.add(answers_path(model_digests(llama_dir), {"dtype": "bfloat16"}))
    assert len(paths) == 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_answers_as_the_cpu_does(llama, tokenizer):
    texts = [" ".join(f"w{(i * step) % 61}" for i in range(length)) for step in (1, 3) for length in (2, 9, 50, 120)]
    pairs = [(text, f" w{word} w5") for text in texts for word in (7, 11)]
    expected = score(llama, Encoder(tokenizer), pairs).answers
    found = score(llama.to("cuda"), Encoder(tokenizer), pairs).answers
    assert list(found) == list(expected)
    assert [a[0] for a in found.values()] == pytest.approx([a[0] for a in expected.values()], rel=1e-4)


@pytest.mark.slow
def test_the_seven_tasks_through_both_command_lines(shared, stories, tmp_path, monkeypatch, capsys):
    files = {
        "boolq": "validation_superglue",
        **dict.fromkeys(("piqa", "hellaswag", "winogrande"), "validation"),
        **dict.fromkeys(("arc_easy", "arc_challenge", "openbookqa"), "test"),
    }
    for name, file in files.items():
        harness_task(name, {file.split("_")[0]: shared / "data" / name / f"{file}.jsonl"}, tmp_path / "own")
    theirs = [
        "-m",
        "lm_eval",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={stories},dtype=float32",
        "--device",
        "cpu",
    ]
    theirs += ["--limit", "5", "--include_path", str(tmp_path / "own"), "--tasks", ",".join(f"{n}_own" for n in files)]
    env = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    command = [sys.executable, *theirs, "--output_path", str(tmp_path / "theirs.json")]
    subprocess.run(command, env=env, check=True, capture_output=True)
    (written,) = tmp_path.glob("theirs*.json")
    expected = json.loads(written.read_text())["results"]
    monkeypatch.setenv("SIGNBIT_CACHE", str(tmp_path / "cache"))
    command = ["eval", stories, "--tasks", "zeroshot7", "--data-dir", str(shared / "data"), "--limit", "5"]
    found, _ = evaluated(command, tmp_path / "ours.json", capsys)
    suite, *tasks = found["tasks"][0]["results"]
    assert {task["name"]: task["of"] for task in tasks} == {
        "boolq": 3270, "piqa": 1838, "hellaswag": 10042, "winogrande": 1267,
        "arc_easy": 2376, "arc_challenge": 1172, "openbookqa": 500,
    }  # fmt: skip
    for task in tasks:
        for metric, value in task["values"].items():
            assert value == expected[f"{task['name']}_own"][f"{metric},none"], (task["name"], metric)
            assert task["stderr"][metric] == expected[f"{task['name']}_own"][f"{metric}_stderr,none"]
    assert suite["values"]["acc"] == pytest.approx(sum(task["values"]["acc"] for task in tasks) / 7)
