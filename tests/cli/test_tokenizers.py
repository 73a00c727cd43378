"""`kdiffusion convert` writes the tokenizer that a single file has not."""

import gzip
import hashlib
from types import SimpleNamespace

import pytest
from corpus import models
from safetensors.numpy import save_file

from kdiffusion import cli
from kdiffusion.cli.tokenizers import write_tokenizer
from kdiffusion.text import vocabulary
from kdiffusion.text.tokenizer import SimpleTokenizer
from kdiffusion.text.vocabulary import PATH_VARIABLE, local_vocabulary

SIZE = 514 + 1  # bytes, two special tokens, and one merge


@pytest.fixture
def words(tmp_path, monkeypatch):
    """A vocabulary of one merge, where `KDIFFUSION_CLIP_VOCAB` names it."""
    path = tmp_path / "words.txt.gz"
    path.write_bytes(gzip.compress(b"#version\na b\n"))
    monkeypatch.setenv(PATH_VARIABLE, str(path))
    return path


def source(pad_id, size=SIZE):
    return SimpleNamespace(
        pad_id=lambda name: pad_id, fields=lambda name: {"vocabulary_size": size}
    )


@pytest.mark.parametrize("pad_id", [None, 0])
def test_the_tokenizer_has_the_pad_id_of_its_file(tmp_path, words, pad_id):
    assert write_tokenizer(tmp_path / "tokenizer", source(pad_id), "text_encoder")
    found = SimpleTokenizer.from_folder(tmp_path / "tokenizer")
    assert found.pad_id == (found.end_of_text if pad_id is None else 0)
    assert found.merges == (("a", "b"),)


def test_a_text_encoder_of_other_tokens_gets_none(tmp_path, words):
    with pytest.warns(UserWarning, match="knows 600 tokens, not the 515 of CLIP"):
        assert not write_tokenizer(tmp_path / "tokenizer", source(None, size=600), "text_encoder")
    assert not (tmp_path / "tokenizer").exists()


@pytest.mark.filterwarnings("always:The folder has no tokenizer")
def test_without_a_vocabulary_the_command_says_how_to_get_one(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(PATH_VARIABLE, raising=False)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    save_file(models.tensors("sd1"), tmp_path / "model.safetensors")
    folder = tmp_path / "folder"
    assert cli.main(["convert", str(tmp_path / "model.safetensors"), str(folder)]) == 0
    assert not (folder / "tokenizer").exists()
    told = capsys.readouterr().err
    assert "warning: The folder has no tokenizer/, because CLIP's vocabulary" in told
    assert PATH_VARIABLE in told and "--tokenizer" in told


def test_a_vocabulary_that_keras_has_fetched_is_found(tmp_path, monkeypatch):
    monkeypatch.delenv(PATH_VARIABLE, raising=False)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    assert local_vocabulary() is None
    (tmp_path / "datasets").mkdir()
    path = tmp_path / "datasets" / vocabulary.NAME
    path.write_bytes(b"damaged")
    assert local_vocabulary() is None
    digest = hashlib.sha256(b"damaged").hexdigest()
    monkeypatch.setattr(vocabulary, "SHA256", digest)
    assert local_vocabulary() == str(path)
