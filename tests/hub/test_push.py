"""signbit push: the card and the files, and what the hub's API is asked. No network."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi, ModelCard, constants

import signbit
from signbit.cli import main
from signbit.errors import FormatError, OptionError
from signbit.hub import push as hub


@pytest.fixture
def out(llama, tokenizer, tmp_path):
    llama.save_pretrained(tmp_path / "dense")
    signbit.quantize_(llama, signbit.SignbitConfig())
    return signbit.save(llama, tmp_path / "OUT", tokenizer, base_model="org/base", command="signbit quantize org/base")


@pytest.fixture
def asked(monkeypatch):
    """What the hub's API is asked for, by a user who has a token."""
    calls = []

    def create_repo(self, repo_id, **kwargs):
        calls.append(("create_repo", repo_id, kwargs))
        return SimpleNamespace(repo_id=f"me/{repo_id}" if "/" not in repo_id else repo_id)

    def create_commit(self, repo_id, operations, **kwargs):
        files = {operation.path_in_repo: operation.path_or_fileobj for operation in operations}
        calls.append(("create_commit", repo_id, files))
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setenv("HF_TOKEN", "hf_made_up")
    return calls


def test_the_card_has_tags_base_model_and_relation(out):
    publication = hub.prepare(out, "me/tiny", license_id="apache-2.0")
    card = ModelCard(publication.card)
    data = card.data.to_dict()
    assert data == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["signbit", "1-bit", "quantized", "absmean"],
        "license": "apache-2.0",
        "base_model": "org/base",
        "base_model_relation": "quantized",
    }
    assert 'from_pretrained("me/tiny")' in card.text
    assert "bits per weight of the binarized layers" in card.text
    assert "signbit quantize org/base" in card.text
    assert hub.prepare(out, "me/tiny", "org/other").base_model == "org/other"


def test_without_a_base_model_no_relation_is_claimed(llama, tokenizer, tmp_path, capsys):
    signbit.quantize_(llama, signbit.SignbitConfig())
    out = signbit.save(llama, tmp_path / "OUT", tokenizer)
    (out / "README.md").unlink()
    assert "base_model" not in ModelCard(hub.prepare(out, "tiny").card).data.to_dict()
    assert main(["push", str(out), "tiny", "--dry-run", str(tmp_path / "folder")]) == 0
    assert "--base-model ID" in capsys.readouterr().err


def test_a_dry_run_writes_the_folder_and_asks_nothing(out, asked, tmp_path, capsys):
    (out / ".secret").write_text("no")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    folder = tmp_path / "folder"
    assert main(["push", str(out), "me/tiny", "--dry-run", str(folder)]) == 0
    assert "has what would be uploaded to me/tiny" in capsys.readouterr().out
    written = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert written.pop("README.md").decode() == hub.prepare(out, "me/tiny").card
    assert written == {name: data for name, data in before.items() if name not in (".secret", "README.md")}
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert not asked
    assert type(signbit.load(folder)).__name__ == "LlamaForCausalLM"
    with pytest.raises(FormatError, match="exists; give --dry-run the name of a new directory"):
        hub.write(hub.prepare(out, "me/tiny"), folder)


def test_a_push_is_one_commit_of_what_the_dry_run_has(out, asked, tmp_path, capsys):
    folder = hub.write(hub.prepare(out, "tiny"), tmp_path / "folder")
    assert main(["push", str(out), "tiny", "--private"]) == 0
    assert "https://hub/me/tiny/commit/1" in capsys.readouterr().out
    (_, repo, options), (_, committed_to, files) = asked
    assert (repo, options) == ("tiny", {"private": True, "exist_ok": True})
    assert committed_to == "me/tiny"
    sent = {name: data if isinstance(data, bytes) else Path(data).read_bytes() for name, data in files.items()}
    assert sent == {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_what_is_no_packed_directory_is_refused_before_the_hub_is_asked(out, asked, tmp_path, capsys):
    assert main(["push", str(tmp_path / "dense"), "me/tiny"]) == 1
    assert "is not packed by signbit" in capsys.readouterr().err
    for damage in ("model.safetensors", "config.json"):
        broken = Path(shutil.copytree(out, tmp_path / damage))
        (broken / damage).write_bytes((broken / damage).read_bytes()[:-9])
        with pytest.raises(FormatError, match=damage):
            hub.prepare(broken, "me/tiny")
    with pytest.raises(FormatError, match="is no directory"):
        hub.prepare(tmp_path / "nothing", "me/tiny")
    assert not asked


@pytest.mark.parametrize("repo", ["a/b/c", "me/ti ny", "-tiny", ""])
def test_names_that_the_hub_does_not_allow(out, repo):
    with pytest.raises(OptionError, match="is no name of a repository on the hub"):
        hub.prepare(out, repo)


def test_without_a_token(out, monkeypatch, capsys):
    monkeypatch.setattr(hub, "get_token", lambda: None)
    assert main(["push", str(out), "me/tiny"]) == 1
    assert "run `hf auth login`, or set HF_TOKEN" in capsys.readouterr().err


def test_a_hub_that_is_offline_or_away(out, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_made_up")
    publication = hub.prepare(out, "me/tiny")
    with pytest.raises(OptionError, match="HF_HUB_OFFLINE is set"):
        hub.push(publication)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "HfApi", lambda **kwargs: HfApi(endpoint="http://127.0.0.1:9", **kwargs))
    with pytest.raises(OptionError, match="the hub could not be reached"):
        hub.push(publication)


@pytest.mark.parametrize(("status", "message"), [(403, "must be one that may write"), (409, "the hub refused me/tiny")])
def test_a_hub_that_refuses(out, asked, monkeypatch, status, message):
    from huggingface_hub.errors import HfHubHTTPError

    def refuse(self, *_, **__):
        raise HfHubHTTPError("no\nmore", response=SimpleNamespace(status_code=status, headers={}, request=None))

    monkeypatch.setattr(HfApi, "create_commit", refuse)
    with pytest.raises(OptionError, match=message):
        hub.push(hub.prepare(out, "me/tiny"))
