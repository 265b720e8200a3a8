"""Training that goes on: from a packed directory, from a run, with another's masks; and without a teacher."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import signbit
from signbit.cli import main
from signbit.errors import OptionError
from signbit.format import read_description
from signbit.hub.distill import Start
from signbit.hub.load import load_any
from signbit.linear import PackedLinear
from signbit.methods import PbllmLinear
from tests.train.runs import metrics, trainer_of

SHORT = "--sequence-length 16 --batch-size 4 --log-every 1 --validation-blocks 2"
IDS = torch.tensor([[3, 5, 7, 11, 13, 17]])


@pytest.fixture
def ptq_dir(llama_dir, tmp_path, text):
    """What signbit quantize makes: calibrated, refined, 10 % salient."""
    calibration = f"--calibration {text} --samples 4 --sequence-length 32"
    words = f"quantize {llama_dir} -o {tmp_path}/ptq --method pbllm --salient 0.1 {calibration}"
    assert main(words.split()) == 0
    return str(tmp_path / "ptq")


def finetune(start, out, text, more="", steps=2):
    return main(f"finetune {start} -o {out} --data {text} --max-steps {steps} {SHORT} {more}".split())


def start_of(command):
    trainer = trainer_of(command)
    return trainer.model.cpu().eval()


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, PbllmLinear)}


@pytest.mark.parametrize("verb", ["finetune", "distill"])
@pytest.mark.parametrize("source", [True, False])
@pytest.mark.parametrize("latent_size", ["", "--latent-size 0"])
def test_step_0_is_the_ptq_model(verb, source, latent_size, ptq_dir, llama_dir, text, tmp_path, capsys):
    start = ptq_dir if verb == "finetune" else f"{llama_dir} --start {ptq_dir}"
    more = f"{latent_size} --source {llama_dir}" if source else latent_size
    model = start_of(f"{verb} {start} -o {tmp_path}/run --data {text} --max-steps 2 {SHORT} {more}")
    assert ("signs × |scale|" in capsys.readouterr().err) == (not source)
    packed, dense = load_any(ptq_dir, "float32"), AutoModelForCausalLM.from_pretrained(llama_dir)
    got, want = model(IDS).logits, packed(IDS).logits
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    found = layers(model)
    assert len(found) == 14
    for name, layer in found.items():
        weight = packed.get_submodule(name).weights[0]
        assert torch.equal(layer.effective_weight(), weight.to_dense()), name
        w = dense.get_submodule(name).weight
        size = (w - weight.shift.float()).abs() if source else weight.scale[0].float().abs().expand_as(w)
        latent, size = layer.weight.detach().abs()[~layer.salient], size[~layer.salient]
        if not latent_size:
            assert latent.mean() == pytest.approx(0.02, rel=1e-5), "whatever the size of the weights"
            latent = latent * size.mean() / 0.02
        assert torch.allclose(latent, size, rtol=1e-5, atol=0)
        assert layer.scale.requires_grad and layer.shift.requires_grad


def test_a_run_from_a_ptq_result_trains_and_packs_without_a_loss(ptq_dir, llama_dir, text, tmp_path, capsys):
    """Salient codes and masks are what they were; everything binary has learnt."""
    run = tmp_path / "run"
    assert finetune(ptq_dir, run, text, f"--source {llama_dir} --learning-rate 0.01", 4) == 0, capsys.readouterr().err
    lines = [line for line in metrics(run) if "loss" in line]
    assert all(line["loss"] == pytest.approx(line["cross_entropy"]) and line["kl"] == 0 for line in lines)
    assert main(f"pack {run} -o {tmp_path}/out".split()) == 0, capsys.readouterr().err
    before, after = load_any(ptq_dir, "float32"), load_any(f"{tmp_path}/out", "float32")
    state = load_file(run / "checkpoint-4" / "model.safetensors")
    changed = 0
    for name, module in before.named_modules():
        if isinstance(module, PackedLinear):
            one, other = module.weights[0], after.get_submodule(name).weights[0]
            assert torch.equal(one.salient.codes, other.salient.codes)
            assert torch.equal(one.salient.positions, other.salient.positions)
            assert torch.equal(one.salient.scale.float(), other.salient.scale)
            assert not torch.equal(one.scale.float(), other.scale)
            changed += int((one.signs != other.signs).sum())
            mask, _ = other.salient.unpack(other.out_features, other.in_features)
            latent = torch.where(state[f"{name}.weight"] >= 0, 1.0, -1.0)
            expected = latent * state[f"{name}.scale"] + state[f"{name}.shift"]
            assert torch.equal(other.to_dense()[~mask], expected[~mask])
    assert changed > 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# llama, packed by signbit" in card, "the source model and not the directory in between"


@pytest.mark.parametrize("more", ["", "--saliency quantiles --scale matrix", "--scale learned --group 8"])
def test_a_model_is_finetuned_packed_and_gone_on_from(more, llama_dir, text, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    words = f"--method pbllm --salient 0.1 {more}"
    assert finetune(llama_dir, run, text, words, 3) == 0, capsys.readouterr().err
    settings = json.loads((run / "run.json").read_text())
    assert settings["config"]["options"]["salient"] == 0.1 and not settings["config"]["options"]["gptq"]
    assert settings["teacher"] is None and settings["objective"]["kd_alpha"] == 0
    assert main(f"pack {run} -o {out}".split()) == 0, capsys.readouterr().err
    # The trained model itself, latents and all, answers as the packed one does; and so does what goes on from either.
    trained = start_of(f"finetune {run} -o {tmp_path}/on --data {text} --max-steps 2 {SHORT}")
    state = load_file(run / "checkpoint-3" / "model.safetensors")
    assert all(torch.equal(tensor, trained.state_dict()[name]) for name, tensor in state.items())
    packed = load_any(str(out), "float32")(IDS).logits
    from_packed = start_of(f"finetune {out} -o {tmp_path}/packed --data {text} --max-steps 2 {SHORT}")
    for model in (trained, from_packed):
        assert (model(IDS).logits - packed).abs().max() <= 1e-5 * packed.abs().max()
    learned = "learned" in more
    assert all((layer.scale is not None) == learned for layer in layers(from_packed).values())


def test_a_run_that_goes_on_is_trained_and_resumed(llama_dir, text, tmp_path, capsys):
    """Exactly: a run killed in its middle ends as one that was not. What goes on is any method's."""
    first, on, cut = tmp_path / "first", tmp_path / "on", tmp_path / "cut"
    assert main(f"distill {llama_dir} -o {first} --data {text} --method onebit --max-steps 2 {SHORT}".split()) == 0
    assert finetune(first, on, text, "--save-every 2", 4) == 0, capsys.readouterr().err
    made = json.loads((on / "run.json").read_text())
    assert made["config"]["method"] == "onebit" and made["start"]["goes_on"]
    shutil.copytree(on, cut)
    shutil.rmtree(cut / "checkpoint-4")
    assert finetune(first, cut, text, "--save-every 2 --resume", 4) == 0, capsys.readouterr().err
    assert metrics(cut) == metrics(on)
    assert main(f"pack {on} -o {tmp_path}/out".split()) == 0, capsys.readouterr().err
    assert "# llama, packed by signbit" in (tmp_path / "out" / "README.md").read_text()
    # With a teacher beside it, a run goes on likewise, and a model that is neither is where a new student starts.
    words = f"-o {tmp_path}/taught --data {text} --max-steps 2 {SHORT}"
    state = load_file(first / "checkpoint-2" / "model.safetensors")
    taught = start_of(f"distill {llama_dir} --start {first} {words}").state_dict()
    assert all(torch.equal(tensor, taught[name]) for name, tensor in state.items())
    other = AutoModelForCausalLM.from_pretrained(llama_dir)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(-1)
    other.save_pretrained(tmp_path / "other")
    model = start_of(f"distill {llama_dir} --start {tmp_path}/other --method fbi {words.replace('taught', 'new')}")
    assert torch.equal(
        model.get_submodule("model.layers.0.mlp.up_proj").weight, other.model.layers[0].mlp.up_proj.weight
    )


def test_another_directorys_masks_are_found_by_its_content(ptq_dir, llama_dir, text, tmp_path, capsys):
    """Wherever it lies; everything else is the model's own, as with the published masks of a Hessian."""
    moved = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(ptq_dir, moved)
    words = f"finetune {llama_dir} -o {tmp_path}/run --data {text} --max-steps 2 {SHORT} --masks {moved} --scale matrix"
    model, packed = start_of(words), load_any(ptq_dir, "float32")
    dense = AutoModelForCausalLM.from_pretrained(llama_dir)
    for name, layer in layers(model).items():
        mask, _ = packed.get_submodule(name).weights[0].salient.unpack(*layer.weight.shape)
        w = dense.get_submodule(name).weight
        assert torch.equal(layer.salient, mask) and torch.equal(layer.weight, w)
        assert layer.scale is None
        assert layer.effective_weight()[~mask].abs().unique().numel() == 1
        assert ((layer.effective_weight() * w)[mask] >= 0).all(), "a small one may become 0, none turns"


def test_a_directory_that_moved_is_the_same_for_a_resumed_run(ptq_dir, text, tmp_path, capsys):
    run, moved = tmp_path / "run", tmp_path / "moved"
    assert finetune(ptq_dir, run, text, "--save-every 1") == 0, capsys.readouterr().err
    shutil.rmtree(run / "checkpoint-2")
    shutil.move(ptq_dir, moved)
    tokenizer = run / "run.json"
    assert tokenizer.exists()
    assert finetune(moved, run, text, "--save-every 1 --resume") == 0, capsys.readouterr().err


def other_model(path, tokenizer):
    from transformers import LlamaForCausalLM

    from tests.conftest import tiny_llama_config

    torch.manual_seed(1)
    LlamaForCausalLM(tiny_llama_config()).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def test_what_does_not_belong_together_is_refused(ptq_dir, llama_dir, text, tokenizer, tmp_path, capsys):
    other = other_model(tmp_path / "other", tokenizer)
    signbit_dir = tmp_path / "absmean"
    assert main(f"quantize {llama_dir} -o {signbit_dir} --method absmean".split()) == 0
    capsys.readouterr()
    for words, message in (
        (f"{ptq_dir} --source {other}", "was not made of"),
        (f"{other} --masks {ptq_dir}", "was not made of"),
        (f"{llama_dir} --masks {signbit_dir}", "is no packed directory of pbllm or pb-gptq"),
        (f"{llama_dir} --masks {llama_dir}", "is no packed directory of pbllm or pb-gptq"),
        (f"{llama_dir} --masks {ptq_dir} --salient 0.3", "whose masks are taken; leave out --salient"),
        (f"{llama_dir} --masks {ptq_dir} --method onebit", "this method has no salient weights"),
        (f"{llama_dir} --source {llama_dir}", "--source is for a student that goes on from a packed directory"),
        (f"{ptq_dir} --masks {ptq_dir}", "--masks is for a student that starts from a model in full precision"),
        (f"{ptq_dir} --salient 0.3", "salient is 0.1 in"),
        (f"{ptq_dir} --scale row", "--scale learned"),
        (f"{ptq_dir} --keep mlp", "leave out --head, --keep"),
        (f"{ptq_dir} --method onebit", "is of the method pbllm"),
        (f"{signbit_dir} --source {llama_dir}", "scales are computed of its latents"),
        (f"{llama_dir} --method pb-gptq", "no layer that is trained"),
        (f"{llama_dir} --saliency hessian", "give --masks PTQ_DIR"),
        (f"{llama_dir} --kd-alpha 0.5", "signbit finetune has no teacher"),
        (f"{llama_dir} --recipe onebit-llama-7b", "has 'teacher', which signbit distill takes"),
    ):
        assert main(f"finetune {words} -o {tmp_path}/no --data {text} --max-steps 2 {SHORT}".split()) == 1, words
        err = capsys.readouterr().err
        assert message in err and "Traceback" not in err, (words, err)
        shutil.rmtree(tmp_path / "no", ignore_errors=True)
    assert main(f"finetune -o {tmp_path}/no {llama_dir} --data {text}".split()) == 1
    assert "stands first behind the verb" in capsys.readouterr().err
    assert main(f"finetune -o {tmp_path}/no --data {text}".split()) == 1
    assert "signbit finetune MODEL|PTQ_DIR|RUN -o RUN" in capsys.readouterr().err
    with pytest.raises(OptionError, match="leave it out"):
        Start(model=llama_dir, source=other)


@pytest.mark.parametrize("method", ["onebit", "absmean --group 8"])
def test_a_packed_directory_of_another_method_goes_on(method, llama_dir, text, tmp_path, capsys):
    """The directory says its method and options."""
    out = tmp_path / "out"
    assert main(f"quantize {llama_dir} -o {out} --method {method}".split()) == 0
    model = start_of(f"finetune {out} -o {tmp_path}/run --data {text} --max-steps 2 {SHORT}")
    want = load_any(str(out), "float32")(IDS).logits
    assert (model(IDS).logits - want).abs().max() <= 1e-5 * want.abs().max()
    assert "signs × |scale|" in capsys.readouterr().err


def test_an_int8_head_goes_on_dense(llama_dir, text, tmp_path, capsys):
    out = tmp_path / "out"
    rtn = "--no-gptq --saliency magnitude"
    assert main(f"quantize {llama_dir} -o {out} --method pbllm --salient 0.2 --head int8 {rtn}".split()) == 0
    words = f"finetune {out} -o {tmp_path}/run --data {text} --max-steps 2 {SHORT} --source {llama_dir}"
    model = start_of(words)
    want = load_any(str(out), "float32")(IDS).logits
    assert (model(IDS).logits - want).abs().max() <= 1e-5 * want.abs().max()
    assert finetune(out, tmp_path / "again", text, f"--source {llama_dir}") == 0, capsys.readouterr().err


def test_pb_gptqs_result_goes_on_as_pbllms(llama_dir, text, tmp_path):
    out = tmp_path / "out"
    words = f"--calibration {text} --samples 4 --sequence-length 32 --salient 0.3"
    assert main(f"quantize {llama_dir} -o {out} --method pb-gptq {words}".split()) == 0
    model = start_of(f"finetune {out} -o {tmp_path}/run --data {text} --max-steps 2 {SHORT}")
    want = load_any(str(out), "float32")(IDS).logits
    assert (model(IDS).logits - want).abs().max() <= 1e-5 * want.abs().max()


def test_biases_are_trained_and_the_head_stays_in_full_precision(tokenizer, text, tmp_path):
    """OPT has both; nothing else is trained in the published runs."""
    from tests import families

    families.DENSE["opt"][0]().save_pretrained(tmp_path / "opt")
    tokenizer.save_pretrained(tmp_path / "opt")
    words = f"finetune {tmp_path}/opt -o {tmp_path}/run --data {text} --max-steps 2 {SHORT} --no-train-norms"
    model = trainer_of(words).model
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    names = layers(model)
    assert trained == {f"{name}.{part}" for name in names for part in ("weight", "bias")} and len(names) == 12
    assert isinstance(model.get_output_embeddings(), torch.nn.Linear)
    assert signbit.METHODS["pbllm"].layer is PbllmLinear


def test_conversations_are_learnt_by_what_the_assistant_says(llama_dir, tmp_path, capsys, monkeypatch):
    """The loss is over these tokens alone: beside the cross-entropy of plain torch."""
    from signbit.train import DistillTrainer

    tokenizer = AutoTokenizer.from_pretrained(llama_dir)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'w50' if m['role'] == 'user' else 'w51' }} {{ m['content'] }} </s> {% endfor %}"
        "{% if add_generation_prompt %}w51 {% endif %}"
    )
    tokenizer.save_pretrained(llama_dir)
    chat = tmp_path / "chat.jsonl"
    rows = [
        [{"role": "user", "content": f"w{i} w{i + 1}"}, {"role": "assistant", "content": f"w{i + 2} w{i + 3}"}]
        for i in range(40)
    ]
    chat.write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    seen, inner = [], DistillTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        found = inner(self, model, inputs, *args, **kwargs)
        if model.training:
            ids, learnt = inputs["input_ids"], inputs["learnt"]
            assert int(learnt.sum()) == 3 * len(ids), "two words and the end of the turn"
            with torch.no_grad():
                logits = model(ids).logits[:, :-1][learnt[:, 1:]].float()
            seen.append(
                (float(found.detach()), float(torch.nn.functional.cross_entropy(logits, ids[:, 1:][learnt[:, 1:]])))
            )
        return found

    monkeypatch.setattr(DistillTrainer, "compute_loss", compute_loss)
    assert finetune(llama_dir, tmp_path / "run", chat) == 0, capsys.readouterr().err
    err = capsys.readouterr().err
    assert "40 conversations, of which what the assistant says is learnt; 0 are cut at 16 tokens, 0 left out" in err
    assert len(seen) == 2 and all(ours == pytest.approx(theirs, rel=1e-4) for ours, theirs in seen)
    words = f"distill {llama_dir} -o {tmp_path}/taught --data {chat} --max-steps 2 {SHORT}"
    assert main(words.split()) == 1
    assert "which are learnt from without a teacher" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe"])
def test_other_kinds_of_linears_go_on(family, tokenizer, text, tmp_path, capsys):
    """GPT-2's, whose weights are stored turned, and a mixture's experts, one a layer."""
    from tests import families

    make = {**families.DENSE, **families.MIXTURES}[family]
    make = make[0] if isinstance(make, tuple) else make
    make().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rtn = "--method pbllm --salient 0.1 --no-gptq --saliency magnitude --allow-partial"
    assert main(f"quantize {tmp_path}/model -o {tmp_path}/ptq {rtn}".split()) == 0
    words = f"--data {text} --max-steps 2 {SHORT}"
    model = start_of(f"finetune {tmp_path}/ptq -o {tmp_path}/run {words} --source {tmp_path}/model")
    want = load_any(f"{tmp_path}/ptq", "float32")(IDS).logits
    assert (model(IDS).logits - want).abs().max() <= 1e-5 * want.abs().max()
    masked = start_of(f"finetune {tmp_path}/model -o {tmp_path}/masked {words} --masks {tmp_path}/ptq --allow-partial")
    assert all(torch.equal(layers(masked)[name].salient, layer.salient) for name, layer in layers(model).items())


def test_training_beats_the_ptq_result_that_it_starts_from(stories, shared, tmp_path, capsys):
    """On a really trained model: the loss on held-out text falls by a fifth in 20 steps."""
    story = (shared / "data" / "tinystories" / "tinystories_train_first_2MiB.txt").read_text(errors="ignore")[:150_000]
    (tmp_path / "stories.txt").write_text(story)
    rtn = "--method pbllm --salient 0.1 --no-gptq --saliency magnitude"
    assert main(f"quantize {stories} -o {tmp_path}/ptq {rtn}".split()) == 0
    held_out = []
    for steps, rate in ((1, 0.0), (20, 1e-3)):
        out = tmp_path / str(steps)
        words = (
            f"finetune {tmp_path}/ptq -o {out} --source {stories} --data {tmp_path}/stories.txt --max-steps {steps} "
            f"--learning-rate {rate} --sequence-length 64 --batch-size 8 --validation-blocks 16"
        )
        assert main(words.split()) == 0, capsys.readouterr().err
        held_out += [line["validation_cross_entropy"] for line in metrics(out) if "validation_cross_entropy" in line]
    assert len(held_out) == 2 and held_out[1] < 0.8 * held_out[0], held_out


class AtStep0(TrainerCallback):
    """What a model answers before its first step."""

    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step == 0:
            with torch.no_grad():
                self.logits = model.eval()(IDS.to(model.device)).logits.cpu()
            model.train()


@pytest.mark.parametrize("words", ["recu", "irnet", "fda", "bnn", "xnor --center", "bireal --act-bits 1"])
def test_a_classic_binarizer_goes_on_from_its_run_and_packed(words, llama_dir, text, tmp_path, capsys):
    """Its annealing, which has ended in a run, does not begin anew; that of a packed directory does, and answers alike."""
    run, out = tmp_path / "run", tmp_path / "out"
    assert finetune(llama_dir, run, text, f"--method {words} --learning-rate 0.01", 3) == 0, capsys.readouterr().err
    assert main(f"pack {run} -o {out}".split()) == 0, capsys.readouterr().err
    packed = load_any(str(out), "float32")(IDS).logits
    for start in (run, out):
        trainer = trainer_of(f"finetune {start} -o {tmp_path}/{start.name}-on --data {text} --max-steps 2 {SHORT}")
        first = AtStep0()
        trainer.add_callback(first)
        trainer.run()
        assert (first.logits - packed).abs().max() <= 1e-5 * packed.abs().max(), start.name


def test_a_binary_head_trains_packs_and_goes_on(llama_dir, text, tmp_path, capsys):
    """As published; its tie to the embedding is cut, and the loss looks at the head's W̃ and reaches its latents."""
    run, out = tmp_path / "run", tmp_path / "out"
    words = "--method pbllm --salient 0.1 --head binary --learning-rate 0.01"
    trainer = trainer_of(f"finetune {llama_dir} -o {tmp_path}/made --data {text} --max-steps 2 {SHORT} {words}")
    head = trainer.model.lm_head
    assert (
        isinstance(head, PbllmLinear)
        and head.weight.data_ptr() != trainer.model.get_input_embeddings().weight.data_ptr()
    )
    ids = torch.randint(64, (2, 16))
    loss, _ = trainer._losses(trainer.model.train(), ids, 0.0)
    want = trainer.model(ids, labels=ids).loss
    assert loss.item() == pytest.approx(want.item(), rel=1e-5), "transformers' own, through the layer"
    ours, theirs = (torch.autograd.grad(value, head.weight)[0] for value in (loss, want))
    assert torch.allclose(ours, theirs, atol=1e-6) and ours.abs().max() > 0
    assert finetune(llama_dir, run, text, words, 4) == 0, capsys.readouterr().err
    assert main(f"pack {run} -o {out}".split()) == 0, capsys.readouterr().err
    packed = load_any(str(out), "float32")
    assert isinstance(packed.lm_head, PackedLinear) and not isinstance(packed.get_input_embeddings(), PackedLinear)
    assert read_description(out)[1].settings["head"] == "binary" and not packed.config.tie_word_embeddings
    state = load_file(run / "checkpoint-4" / "model.safetensors")
    assert not torch.equal(state["lm_head.weight"], AutoModelForCausalLM.from_pretrained(llama_dir).lm_head.weight)
    logits = packed(IDS).logits
    for start in (run, out):
        model = start_of(f"finetune {start} -o {tmp_path}/{start.name}-on --data {text} --max-steps 2 {SHORT}")
        assert isinstance(model.lm_head, PbllmLinear)
        assert (model(IDS).logits - logits).abs().max() <= 1e-5 * logits.abs().max()
    from transformers import AutoModel

    states = AutoModel.from_pretrained(out)(IDS).last_hidden_state
    assert torch.allclose(packed.lm_head(states), logits, atol=1e-5 * float(logits.abs().max()))
    for words, message in (
        (
            f"finetune {llama_dir} --method bitnet --head binary",
            "a binary head is a product with its matrix and nothing else",
        ),
        (f"finetune {out} --head keep --keep mlp", "leave out --head, --keep"),
    ):
        assert main(f"{words} -o {tmp_path}/no --data {text} --max-steps 2 {SHORT}".split()) == 1
        assert message in capsys.readouterr().err
        shutil.rmtree(tmp_path / "no", ignore_errors=True)
    with pytest.raises(OptionError, match="a binary output head is trained"):
        signbit.quantize_(
            AutoModelForCausalLM.from_pretrained(llama_dir), signbit.SignbitConfig("absmean", head="binary")
        )
