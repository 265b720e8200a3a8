"""What `signbit distill` makes of its words: teacher, student and data, as they are before the first step."""

import itertools

import pytest
import torch

from signbit.linear import BinaryLinear
from tests.train.runs import trainer_of


@pytest.fixture
def made(llama_dir, text, tmp_path):
    """More words → the trainer."""
    runs = itertools.count()

    def make(more="", data=text):
        return trainer_of(
            f"distill {llama_dir} -o {tmp_path}/{next(runs)} --data {data} --max-steps 4 --sequence-length 16 "
            f"--batch-size 4 --validation-blocks 5 {more}"
        )

    return make


def blocks(data, count):
    return [tuple(data[i]["input_ids"].tolist()) for i in range(count)]


def test_what_is_held_out_is_never_learnt_from(made):
    trainer = made()
    learnt = blocks(trainer.train_dataset, trainer.train_dataset.one_pass)
    held = blocks(trainer.eval_dataset, len(trainer.eval_dataset))
    assert len(set(learnt)) == 370 and len(set(held)) == 5 and not set(learnt) & set(held)


def test_the_seed_is_that_of_the_datas_order_and_of_nothing_held_out(made):
    one, again, other = (made(f"--seed {seed}") for seed in (1, 1, 2))
    learnt = [blocks(trainer.train_dataset, 20) for trainer in (one, again, other)]
    assert learnt[0] == learnt[1] != learnt[2]
    held = [blocks(trainer.eval_dataset, 5) for trainer in (one, other)]
    assert set(held[0]) == set(held[1])


def test_a_mixture_has_the_weights_that_were_given(made, text, tmp_path):
    (tmp_path / "more.txt").write_text(" ".join(reversed(text.read_text().split())))
    data = made(data=f"{text}=3 --data {tmp_path}/more.txt=1").train_dataset
    assert [data.locate(i)[0] for i in range(400)].count(0) == 300


@pytest.mark.parametrize(
    ("words", "norms", "embeddings"),
    [("", True, False), ("--no-train-norms", False, False), ("--train-embeddings", True, True)],
)
def test_what_is_trained_beside_the_binary_layers(words, norms, embeddings, made):
    model = made(words).model
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    binary = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, BinaryLinear)
        for name, _ in module.named_parameters()
    }
    rest = {name: "norm" in name for name, _ in model.named_parameters() if name not in binary}
    assert len(binary) == 14 * 3 and sum(rest.values()) == 5 and len(rest) == 6
    assert trained == binary | {name for name, norm in rest.items() if (norms if norm else embeddings)}


def test_attentions_are_compared_where_they_are_computed(made):
    """Other ways of attention than "eager" form none."""
    trainer = made("--kd-gamma 2 --kd-alpha 0.5")
    assert {trainer.model.config._attn_implementation, trainer.teacher.config._attn_implementation} == {"eager"}
    ids = torch.randint(3, 60, (4, 16), device=trainer.args.device)
    _, parts = trainer.compute_loss(trainer.model, {"input_ids": ids}, return_outputs=True)
    assert parts["attention"] > 0
    assert made().model.config._attn_implementation != "eager"
