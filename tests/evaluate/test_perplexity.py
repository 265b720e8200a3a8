"""Perplexity against distributions known in closed form, and the protocols against what they say."""

import gzip
import json
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.conftest import tiny_llama_config
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import signbit
from signbit.data import PROTOCOLS, read_set, read_text_file
from signbit.errors import DataError, OptionError, WeightError
from signbit.evaluate.kept import KeptWindows, keep
from signbit.evaluate.perplexity import TextOptions, _windows, check, perplexity
from signbit.evaluate.size import measure_size


class Known(nn.Module):
    """A model of a known distribution: token t+1 follows t with probability `p`, the others share the rest."""

    def __init__(self, vocabulary=64, p=0.75):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        table = torch.full((vocabulary, vocabulary), (1 - p) / (vocabulary - 1))
        for token in range(vocabulary):
            table[token, (token + 1) % vocabulary] = p
        self.table = table.log()
        self.config = SimpleNamespace(max_position_embeddings=4096)
        self.dtype = torch.float32
        self.seen = []

    def forward(self, input_ids, use_cache):
        self.seen.append(input_ids[0].tolist())
        return SimpleNamespace(logits=self.table[input_ids])


def text_of(ids):
    return " ".join(f"w{i}" for i in ids)


def write_ids(tmp_path, ids, name="text.txt"):
    file = tmp_path / name
    file.write_text(text_of(ids))
    return str(file)


def test_perplexity_is_the_analytic_value(tokenizer, tmp_path):
    cycle = [i % 61 for i in range(400)]  # every step t → t+1 but the wrap from 60 to 0
    model = Known(p=0.75)
    file = write_ids(tmp_path, cycle[:61])
    result = perplexity(model, tokenizer, file, options=TextOptions(window=20))
    assert result.perplexity == pytest.approx(1 / 0.75, rel=1e-6)
    assert (result.windows, result.predicted_tokens) == (3, 57)
    file = write_ids(tmp_path, [5, 9] * 20)
    result = perplexity(model, tokenizer, file, options=TextOptions(window=40))
    assert result.perplexity == pytest.approx(63 / 0.25, rel=1e-5)


def one_layer(steps):
    """A Llama of one layer whose p(t + s | t) is `steps`[s] over 64 tokens in a circle, and next to 0 elsewhere.

    Attention and MLP add nothing, the embedding is one-hot, and the final norm makes √64 of its 1: the head's column t is
    ln p(· | t) / 8.
    """
    model = LlamaForCausalLM(
        tiny_llama_config(hidden_size=64, num_hidden_layers=1, max_position_embeddings=512, tie_word_embeddings=False)
    )
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(64))
        table = torch.full((64, 64), -60.0)
        for step, p in steps.items():
            table[torch.arange(64), (torch.arange(64) + step) % 64] = math.log(p)
        model.lm_head.weight.copy_(table.T / 8)
    return model.eval()


def circuit(steps):
    """A walk that takes each step from each of 64 tokens exactly as often as `steps` says (Hierholzer)."""
    left = {token: [s for s, times in steps.items() for _ in range(times)] for token in range(64)}
    stack, walk = [3], []
    while stack:
        if left[stack[-1]]:
            stack.append((stack[-1] + left[stack[-1]].pop()) % 64)
        else:
            walk.append(stack.pop())
    return walk[::-1]


def test_the_perplexity_of_one_layer_is_the_exponential_of_its_entropy(tmp_path):
    # H = 1/2 ln 2 + 2 · 1/4 ln 4 = 3/2 ln 2
    ids = circuit({1: 2, 2: 1, 7: 1})
    assert len(ids) == 4 * 64 + 1
    words = PreTrainedTokenizerFast(tokenizer_object=numbered_words())
    file = write_ids(tmp_path, ids)
    model = one_layer({1: 0.5, 2: 0.25, 7: 0.25})
    result = perplexity(model, words, file, options=TextOptions(window=len(ids)))
    assert (result.windows, result.predicted_tokens) == (1, 256)
    assert result.perplexity == pytest.approx(2**1.5, rel=1e-5)
    other = perplexity(one_layer({1: 0.25, 2: 0.5, 7: 0.25}), words, file, options=TextOptions(window=len(ids)))
    assert other.perplexity == pytest.approx(2**1.75, rel=1e-5)  # cross-entropy: 1/2 · ln 4 + 1/4 · ln 2 + 1/4 · ln 4


def numbered_words():
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return inner


def test_windows_predict_every_token_but_their_first():
    ids = torch.arange(103)
    cut = _windows(ids, 20, 20, None)
    assert [len(w) for w, _ in cut] == [20] * 5
    assert all(context == 0 for _, context in cut)
    assert torch.equal(torch.cat([w for w, _ in cut]), ids[:100])


def test_a_stride_predicts_each_token_once(tokenizer, tmp_path):
    model = Known()
    file = write_ids(tmp_path, [i % 61 for i in range(50)])
    result = perplexity(model, tokenizer, file, options=TextOptions(window=20, stride=10))
    assert result.windows == 4
    assert result.predicted_tokens == 19 + 3 * 10
    assert result.perplexity == pytest.approx(1 / 0.75, rel=1e-6)


def test_bos_stands_before_each_window_and_costs_no_token(tokenizer, tmp_path):
    model = Known()
    file = write_ids(tmp_path, [i % 61 for i in range(39)])
    result = perplexity(model, tokenizer, file, options=TextOptions(window=20, bos=True))
    assert [seen[0] for seen in model.seen] == [1, 1]
    assert [seen[1:] for seen in model.seen] == [list(range(3, 22)), list(range(22, 41))]
    assert result.predicted_tokens == 38
    assert result.bos
    assert result.stride == 19


def test_long_windows_in_pieces_give_the_same(tokenizer, tmp_path):
    file = write_ids(tmp_path, [random.Random(0).randint(0, 60) for _ in range(1500)])
    model = Known()
    result = perplexity(model, tokenizer, file, options=TextOptions(window=1500))
    ids = tokenizer(Path(file).read_text(), return_tensors="pt", add_special_tokens=False).input_ids[0]
    want = nn.functional.cross_entropy(model.table[ids[:-1]], ids[1:]).item()
    assert result.nll == pytest.approx(want, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(want), rel=1e-6)


def test_each_process_measures_its_share_of_the_windows(tokenizer, tmp_path, monkeypatch):
    file = write_ids(tmp_path, random.Random(0).choices(range(61), k=150))
    options = TextOptions(window=20)
    whole = perplexity(Known(), tokenizer, file, options=options)
    shares = []

    def gathered(parts):
        shares.extend(dict(part) for part in parts)
        return list(shares)

    monkeypatch.setattr(sys.modules["signbit.evaluate.perplexity"], "gather_object", gathered)
    models = [Known() for _ in range(3)]
    found = [
        perplexity(model, tokenizer, file, options=options, processes=(place, 3)) for place, model in enumerate(models)
    ]
    assert [len(model.seen) for model in models] == [3, 2, 2]
    assert sorted(at for share in shares for at in share) == list(range(7))
    # The last one has gathered from all: the sum is made in the order of the windows, as in one process.
    assert (found[-1].nll, found[-1].predicted_tokens) == (whole.nll, whole.predicted_tokens)


def test_windows_that_are_kept_are_not_measured_again(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("SIGNBIT_CACHE", str(tmp_path / "cache"))
    file = write_ids(tmp_path, random.Random(0).choices(range(61), k=150))
    options, machine = TextOptions(window=20), {"device": "one"}
    whole = perplexity(Known(), tokenizer, file, options=options)

    def measured(model, place, number, machine=machine):
        kept = KeptWindows("a" * 64, {"x": 1}, machine, place)
        return perplexity(model, tokenizer, file, options=options, processes=(place, number), kept=kept)

    shares = []
    monkeypatch.setattr(
        sys.modules["signbit.evaluate.perplexity"], "gather_object", lambda parts: shares.extend(parts) or shares
    )
    for place, calls in ((0, 2), (1, 1)):  # each of two processes is killed behind its second, and its first window
        killed = Known()
        monkeypatch.setattr(killed, "forward", stopping(killed.forward, calls))
        with pytest.raises(KeyboardInterrupt):
            measured(killed, place, 2)
    shares.clear()
    folder = tmp_path / "cache" / "measured" / ("a" * 32)
    assert len(list(folder.glob("*.jsonl"))) == 2
    with next(folder.glob("*-1.jsonl")).open("a") as stream:
        stream.write('\n7\nnull\n[1, "x", 2]\n{"a": 1}\n[3, 1.0')
    model = Known()
    found = measured(model, 0, 1)
    assert (len(model.seen), found.nll, found.predicted_tokens) == (7 - 3, whole.nll, whole.predicted_tokens)
    model = Known()
    assert measured(model, 0, 1, {"device": "another"}).nll == whole.nll and len(model.seen) == 7
    keep("a" * 64, {"x": 1}, found.to_dict(), machine)
    assert len(list(folder.glob("*"))) == 1, "the whole stands in their place"


def stopping(forward, calls):
    """`forward`, which ends its process at the call after the first `calls`."""
    left = [None] * calls

    def called(input_ids, use_cache):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return forward(input_ids, use_cache)

    return called


def test_fewer_windows_are_said(tokenizer, tmp_path):
    file = write_ids(tmp_path, range(50))
    result = perplexity(Known(), tokenizer, file, options=TextOptions(window=10), max_windows=2)
    assert result.protocol == "text.txt, first 2 of 5 windows"
    assert result.windows == 2


def test_nan_logits_stop(tokenizer, tmp_path):
    model = Known()
    model.table = model.table * float("nan")
    with pytest.raises(WeightError, match=r"window 1 of text\.txt: the model's logits are NaN"):
        perplexity(model, tokenizer, write_ids(tmp_path, range(50)), options=TextOptions(window=10))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TextOptions(window=1), "a window of 1 tokens needs"),
        (TextOptions(window=10, stride=11), "needs 1 ≤ stride ≤ 10; the stride is 11"),
        (TextOptions(window=10, stride=0), "needs 1 ≤ stride ≤ 10"),
        (TextOptions(window=5000), "has 50 tokens, fewer than one window of 5000"),
    ],
)
def test_bad_windows(options, message, tokenizer, tmp_path):
    with pytest.raises((OptionError, DataError), match=message):
        perplexity(Known(), tokenizer, write_ids(tmp_path, range(50)), options=options)


def test_a_window_beyond_the_models_context(tokenizer, tmp_path):
    model = Known()
    model.config.max_position_embeddings = 16
    with pytest.raises(OptionError, match="the model has 16 positions"):
        perplexity(model, tokenizer, write_ids(tmp_path, range(50)), options=TextOptions(window=32))


def test_a_protocol_fixes_its_window():
    with pytest.raises(
        OptionError, match=r"--window, --stride and --bos are for texts of your own; wikitext2 is windows"
    ):
        check("wikitext2", None, TextOptions(window=512))
    with pytest.raises(
        DataError, match=r"nowhere\.txt is no file, and no named set either; the named ones are wikitext2, ptb"
    ):
        check("nowhere.txt")
    with pytest.raises(OptionError, match="no beginning-of-sequence"):
        perplexity(None, SimpleNamespace(bos_token_id=None), __file__, options=TextOptions(bos=True))


# Protocols on files made here.


def c4_file(folder, documents):
    (folder / "c4").mkdir()
    lines = "".join(json.dumps({"text": d}) + "\n" for d in documents)
    (folder / "c4" / "c4-validation.jsonl").write_text(lines)
    return folder


def test_wikitext2_rows_are_lines_with_blank_ones_empty(tmp_path, tokenizer):
    (tmp_path / "wiki.test.raw").write_text(" \n = Title = \n \nText\u2028one\x85 .\nend")
    text = read_set(PROTOCOLS["wikitext2"], tmp_path)
    assert text.documents == ("", " = Title = \n", "", "Text\u2028one\x85 .\n", "end"), "lines end at \\n alone"
    result = check("wikitext2", tmp_path)
    assert result is None


def test_ptb_rows_are_stripped_lines_joined_by_spaces(tmp_path):
    (tmp_path / "ptb.test.txt").write_text(" no it was n't \n\n but they could \n")
    assert read_set(PROTOCOLS["ptb"], tmp_path).documents == ("no it was n't", "but they could")
    assert PROTOCOLS["ptb"].joiner == " "


def test_a_smaller_local_set_is_named_so(tmp_path, tokenizer):
    folder = c4_file(tmp_path, [text_of(range(60))] * 40)
    result = perplexity(Known(), tokenizer, "c4-first1100", folder)
    assert result.protocol == "c4-first1100, 40 of 1100 documents"
    assert result.windows == 1
    assert result.source.endswith("c4-validation.jsonl")


def test_c4_first1100_takes_1100_documents_and_256_windows(tmp_path, tokenizer):
    folder = c4_file(tmp_path, [text_of(i % 61 for i in range(1000))] * 1200)
    model = Known()
    result = perplexity(model, tokenizer, "c4-first1100", folder, max_windows=1)
    assert result.protocol == "c4-first1100, first 1 of 256 windows"


def test_c4_random256_draws_as_published(tmp_path, tokenizer):
    documents = [text_of((i + j) % 61 for j in range(length)) for i, length in enumerate((100, 2049, 2500, 2048, 3000))]
    model = Known()
    perplexity(model, tokenizer, "c4-random256", c4_file(tmp_path, documents), max_windows=12)
    generator, expected = random.Random(0), []
    while len(expected) < 12:
        index = generator.randint(0, 4)
        ids = tokenizer(documents[index]).input_ids
        if len(ids) > 2048:
            start = generator.randint(0, len(ids) - 2049)
            expected.append(ids[start : start + 2048])
    assert model.seen == expected


def test_c4_random256_without_a_long_document(tmp_path, tokenizer):
    with pytest.raises(DataError, match="no document is longer than one window of 2048"):
        perplexity(Known(), tokenizer, "c4-random256", c4_file(tmp_path, ["w1 w2"]))


def test_missing_local_files_name_where_they_are_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"no file for ptb; it is looked for as ptb/ptb\.test\.txt, ptb\.test\.txt"):
        check("ptb", tmp_path)
    with pytest.raises(DataError, match="is no directory"):
        check("ptb", tmp_path / "x")


def test_text_files(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert read_text_file(tmp_path / "a.jsonl").documents == ("one", "two")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as stream:
        stream.write('{"text": "three"}\n')
    assert read_text_file(tmp_path / "b.jsonl.gz").documents == ("three",)
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n{"txt": 3}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl, line 2: not a JSON object with a text"):
        read_text_file(tmp_path / "bad.jsonl")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(DataError, match="holds no text"):
        read_text_file(tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="is not UTF-8 text"):
        read_text_file(tmp_path / "latin.txt")


def test_the_shipped_excerpt_is_small_and_named():
    text = read_set(PROTOCOLS["casterbridge"])
    assert 20_000 < len(text.documents[0].encode()) < 200_000
    assert "Hardy, 1886" in PROTOCOLS["casterbridge"].help
    assert "Henchard" in text.documents[0]


def test_hub_sets_without_a_hub_say_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs the package datasets.*--data-dir"):
        read_set(PROTOCOLS["ptb"])


def test_hub_rows_are_read_through_datasets(monkeypatch):
    calls = []

    def load_dataset(*arguments, **keywords):
        calls.append((arguments, keywords))
        return [{"text": f"row {i}", "sentence": f"row {i}"} for i in range(5000)]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert len(read_set(PROTOCOLS["wikitext2"]).documents) == 4358
    assert len(read_set(PROTOCOLS["c4-first1100"]).documents) == 1100
    assert calls[0] == (("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test", "revision": None})
    assert calls[1][1]["data_files"] == {"validation": "en/c4-validation.00000-of-00008.json.gz"}


def test_the_packed_model_and_its_twin_agree_on_real_text(shared, stories, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = AutoTokenizer.from_pretrained(stories)
    text = (shared / "data" / "tinystories" / "tinystories_train_first_2MiB.txt").read_text()[:20000]
    (tmp_path / "stories.txt").write_text(text)
    options = TextOptions(window=256)
    dense = AutoModelForCausalLM.from_pretrained(stories)
    anchor = perplexity(dense, words, tmp_path / "stories.txt", options=options).perplexity
    model = AutoModelForCausalLM.from_pretrained(
        stories,
        quantization_config=signbit.SignbitConfig("pbllm", salient=0.5, gptq=False, saliency="magnitude"),
    )
    packed = perplexity(model, words, tmp_path / "stories.txt", options=options).perplexity
    twin = perplexity(model.dequantize(), words, tmp_path / "stories.txt", options=options).perplexity
    assert f"{packed:.4g}" == f"{twin:.4g}"
    assert anchor < packed < 10 * anchor


@pytest.mark.slow
def test_smollm2_is_loaded_right(shared):
    """The anchor of ../shared/data/SOURCES.md: the first 4 windows of WikiText-2, 24.15 in float32."""
    from demo.smollm2 import model_directory

    from signbit.hub.load import load_any, load_tokenizer

    directory = str(model_directory())
    result = perplexity(load_any(directory), load_tokenizer(directory), "wikitext2", shared / "data", max_windows=4)
    assert result.perplexity == pytest.approx(24.15, abs=0.01)
    assert "of 148 windows" in result.protocol


# Size.


@pytest.mark.parametrize(("salient", "bits"), [(0.1, 8), (0.3, 1)])
def test_info_counts_bytes(llama, tmp_path, salient, bits):
    before = sum(p.numel() for p in llama.parameters())
    config = signbit.SignbitConfig(
        "pbllm", salient=salient, salient_bits=bits, gptq=False, saliency="magnitude", head="int8"
    )
    signbit.quantize_(llama, config)
    out = signbit.save(llama, tmp_path / "packed")
    size = measure_size(out)
    assert size.parameters == before
    assert size.file_bytes == (out / "model.safetensors").stat().st_size
    assert size.bits_per_parameter == 8 * size.file_bytes / before
    for layer in size.layers:
        module = llama.get_submodule(layer.name)
        assert layer.nbytes == module.nbytes
        assert layer.salient == module.weights[0].salient.count / (layer.out_features * layer.in_features)
    assert {k.name for k in size.kinds()} == {
        n.replace(".0.", ".*.") for n in (layer.name for layer in size.layers) if ".0." in n
    }
    assert json.loads(json.dumps(size.to_dict()))["layers"][0]["bits_per_weight"] == size.layers[0].bits_per_weight
