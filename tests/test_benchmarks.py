"""That benchmarks time nothing which is wrong."""

import json
import sys

import pytest
import torch
from benchmarks import ablations, kernels_cpu, kernels_cuda, trained
from transformers import LlamaForCausalLM

from signbit.ops import cpu, cuda
from signbit.weight import BinaryWeight


def two_matrices(device):
    with torch.device(device):
        return [BinaryWeight.from_signs(torch.randn(64, 256), torch.rand(1, 64, 1) + 0.1) for _ in range(2)]


@pytest.mark.skipif(cpu.selected()[0] is None, reason="no kernels for this CPU")
def test_a_wrong_product_on_the_cpu_ends_the_run():
    (isa, _), (right, wrong), x = cpu.selected(), two_matrices("cpu"), torch.randn(3, 256)
    kernels_cpu.check(right, cpu.prepare(right.operands()), isa, x)
    with pytest.raises(SystemExit, match="off the reference; nothing is timed"):
        kernels_cpu.check(right, cpu.prepare(wrong.operands()), isa, x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_wrong_product_on_the_gpu_ends_the_run():
    right, wrong = two_matrices("cuda")
    kernels_cuda.check(right, cuda.Multiplication(cuda.prepare(right.operands())), 3, torch.bfloat16)
    with pytest.raises(SystemExit, match="off the reference; nothing is timed"):
        kernels_cuda.check(right, cuda.Multiplication(cuda.prepare(wrong.operands())), 3, torch.bfloat16)


@pytest.fixture
def measurable(tokenizer, tmp_path):
    """A tiny model of enough positions, and text in the place of WikiText-2."""
    from tests.conftest import tiny_llama_config

    LlamaForCausalLM(tiny_llama_config(max_position_embeddings=2048)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "wikitext2").mkdir()
    words = torch.randint(61, (4200,)).tolist()
    (tmp_path / "wikitext2" / "wiki.test.raw").write_text(" ".join(f"w{word}" for word in words))


def test_trained_models_stand_in_one_table(measurable, tmp_path, monkeypatch, capsys):
    from signbit.cli import main
    from signbit.evaluate.size import measure_size
    from signbit.hub.load import load_any, load_tokenizer

    for share in (0.1, 0.3):
        words = f"--method pbllm --salient {share} --no-gptq --saliency magnitude"
        assert main(f"quantize {tmp_path}/model -o {tmp_path}/{share} {words}".split()) == 0
    rows, picture = tmp_path / "rows.jsonl", tmp_path / "trained.png"
    command = [
        "trained", f"{tmp_path}/model", f"PTQ, 10 %={tmp_path}/0.1", f"PTQ, 30 %={tmp_path}/0.3", "--data-dir", f"{tmp_path}",
        "--max-windows", "1", "--rows", f"{rows}", "--plot", f"{picture}",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    capsys.readouterr()
    trained.main()
    table = capsys.readouterr().out.strip().splitlines()[-5:]
    tokenizer = load_tokenizer(f"{tmp_path}/model")
    for line, name, share in zip(table[3:], ("PTQ, 10 %", "PTQ, 30 %"), (0.1, 0.3), strict=True):
        model, bits = load_any(f"{tmp_path}/{share}"), measure_size(tmp_path / str(share)).bits_per_weight
        want = trained.signbit.perplexity(model, tokenizer, "wikitext2", tmp_path, max_windows=1).perplexity
        assert line == f"| {name} | {bits:.3f} | {want:.5g} |"
    assert picture.stat().st_size > 0 and table[2].startswith("| full precision | 16.000 |")
    monkeypatch.setattr(trained, "load_any", None)
    trained.main()
    assert capsys.readouterr().out.strip().splitlines() == table


def test_ablations_resume_and_print_one_table(measurable, tmp_path, monkeypatch, capsys):
    """At tiny size: every cell is measured once, and the table has it where it belongs."""
    rows = tmp_path / "rows.jsonl"
    command = (
        f"ablations {tmp_path}/model --data-dir {tmp_path} --calibration {tmp_path}/wikitext2/wiki.test.raw --samples 2 "
        f"--sequence-length 32 --max-windows 1 --group 8 --shares 0.5 0.0 --rows {rows}"
    )
    monkeypatch.setattr(sys, "argv", command.split())
    ablations.main()
    table = capsys.readouterr().out[-2000:].strip().splitlines()[-12:]
    assert table[0] == "| | 50% salient | 20% salient | 10% salient | 5% salient |"
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len(found) == 10 and len({row["setting"] for row in found}) == 10
    by_label = {line.split("|")[1].strip(): [part.strip() for part in line.split("|")[2:-1]] for line in table[2:]}
    assert len(by_label) == 10
    rtn = next(row for row in found if row["setting"] == "pb-gptq: gptq=false")
    assert by_label["rounded to nearest, Hessian"] == [ablations.cell(rtn), "", "", ""]
    assert len({row["perplexity"] for row in found}) == 10, "each cell is of a setting of its own"
    assert by_label[ablations.DENSE][0].endswith("(16.00)") and by_label["GPTQ, 4 bits, none salient"][0].endswith(
        f"({next(row for row in found if row['share'] == 0)['bits_per_weight']:.2f})"
    )
    bits = {row["setting"]: row["bits_per_weight"] for row in found}
    assert bits["pb-gptq: low=4bit"] < bits["pb-gptq: low=prune"]
    assert bits["pb-gptq: group=8"] > bits["pb-gptq"]
    # Nothing is measured twice, and rows of another run are not taken for this one's.
    monkeypatch.setattr(ablations, "measure", None)
    monkeypatch.setattr(ablations, "load_any", None)
    ablations.main()
    assert capsys.readouterr().out.strip().splitlines() == table
    monkeypatch.setattr(sys, "argv", [*command.split(), "--samples", "3"])
    with pytest.raises(SystemExit, match="rows of another run"):
        ablations.main()
