import gzip
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from kdiffusion.text import vocabulary
from kdiffusion.text.tokenizer import SimpleTokenizer

# A vocabulary of our own, small enough to count by hand: it starts at id 512.
MERGES = [("c", "a"), ("ca", "t</w>"), ("t", "h"), ("th", "e</w>"), ("d", "o"), ("do", "g</w>")]


@pytest.fixture
def tokenizer():
    return SimpleTokenizer(vocabulary.trained_ids(MERGES), MERGES)


def as_json(content):
    return json.dumps(content, ensure_ascii=False)


def write_folder(folder, **files):
    """Writes the tokenizer of MERGES into a folder, or what is given instead of its files."""
    folder.mkdir(exist_ok=True)
    lines = "".join(f"{first} {second}\n" for first, second in MERGES)
    files = {
        "vocab.json": as_json(vocabulary.trained_ids(MERGES)),
        "merges.txt": f"#version: 0.2\n{lines}",
    } | files
    for name, content in files.items():
        if content is not None:
            content = content if isinstance(content, bytes) else content.encode()
            (folder / name).write_bytes(content)
    return folder


def test_folder_of_vocab_and_merges(tokenizer, tmp_path):
    read = SimpleTokenizer.from_folder(write_folder(tmp_path))
    assert (read.encoder, read.merges) == (tokenizer.encoder, tokenizer.merges)
    assert (read.pad_id, read.max_length) == (519, 77)
    windows = (tmp_path / "merges.txt").read_text().replace("\n", "\r\n")
    assert SimpleTokenizer.from_folder(write_folder(tmp_path, **{"merges.txt": windows})).merges


@pytest.mark.parametrize("form", ["strings", "pairs"])
def test_folder_of_tokenizer_json_alone(tokenizer, tmp_path, form):
    tokenizer.add_tokens(["<MyCat>", "dog"])
    merges = [" ".join(pair) if form == "strings" else pair for pair in MERGES]
    listed = [
        {"id": index, "content": token}
        for token, index in tokenizer.encoder.items()
        if index > 517 or token == "!"
    ]
    ids = vocabulary.trained_ids(MERGES)
    content = {"added_tokens": listed, "model": {"type": "BPE", "vocab": ids, "merges": merges}}
    (tmp_path / "tokenizer.json").write_text(as_json(content))
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "!", "model_max_length": 1e30}')
    read = SimpleTokenizer.from_folder(tmp_path)
    assert (read.encoder, read.merges) == (tokenizer.encoder, tokenizer.merges)
    assert (read.pad_id, read.max_length) == (0, 77)
    assert read.encode("the <mycat>") == [518, 515, 520, 519]


BANG = {"content": "!", "lstrip": False, "special": True}
END = "<|endoftext|>"


@pytest.mark.parametrize(
    "config, roles, pad_id",
    [
        ({"pad_token": END}, {"pad_token": "!"}, 0),  # Stable Diffusion 2
        ({"pad_token": END}, {"pad_token": BANG}, 0),
        ({"pad_token": BANG, "model_max_length": 77}, None, 0),
        ({"pad_token": "!"}, {"eos_token": END}, 0),
        ({"pad_token": "!", "added_tokens_decoder": {"0": BANG}}, {"pad_token": END}, 0),
        ({"pad_token": None}, {"pad_token": END}, 519),
        ({}, {}, 519),
    ],
)
def test_pad_id_of_a_folder(tmp_path, config, roles, pad_id):
    files = {"tokenizer_config.json": as_json(config)}
    files["special_tokens_map.json"] = None if roles is None else as_json(roles)
    tokenizer = SimpleTokenizer.from_folder(write_folder(tmp_path, **files))
    assert tokenizer.pad_id == pad_id
    assert tokenizer.rows(["cat"])[0].tolist() == [518, 513, 519] + [pad_id] * 74


def test_added_tokens_of_a_folder(tmp_path):
    folder = write_folder(tmp_path, **{"added_tokens.json": '{"<b>": 521, "<A>": 520}'})
    assert SimpleTokenizer.from_folder(folder).encode("<a><b>")[1:-1] == [520, 521]
    config = {"added_tokens_decoder": {"520": {"content": "[PAD]"}}, "pad_token": "[PAD]"}
    write_folder(tmp_path, **{"tokenizer_config.json": as_json(config)})
    assert SimpleTokenizer.from_folder(folder).pad_id == 520


def test_bytes_that_a_small_vocabulary_lacks(tmp_path):
    ids = {"a": 0, "a</w>": 1, "b": 2, "b</w>": 3, "<unk>": 4, "<|startoftext|>": 5, END: 6}
    files = {"vocab.json": as_json(ids), "merges.txt": "#version: 0.2\n"}
    with pytest.raises(ValueError, match="vocab.json: the vocabulary lacks '!', .*508 in all"):
        SimpleTokenizer.from_folder(
            write_folder(tmp_path, **files, **{"tokenizer_config.json": '{"unk_token": "?"}'})
        )
    config = '{"unk_token": "<unk>"}'
    write_folder(tmp_path, **files, **{"tokenizer_config.json": config})
    tokenizer = SimpleTokenizer.from_folder(tmp_path)
    assert tokenizer.encode("abc ba") == [5, 0, 2, 4, 2, 1, 6]
    tokenizer.save(tmp_path / "saved")
    assert SimpleTokenizer.from_folder(tmp_path / "saved").encode("c") == [5, 4, 6]


def test_a_path_in_a_config_is_not_opened(tmp_path):
    other = write_folder(tmp_path / "other", **{"added_tokens.json": '{"<x>": 520}'})
    paths = {"vocab_file": str(other / "vocab.json"), "name_or_path": "/nowhere"}
    paths["added_tokens_file"] = str(other / "added_tokens.json")
    folder = write_folder(tmp_path / "folder", **{"tokenizer_config.json": as_json(paths)})
    assert "<x>" not in SimpleTokenizer.from_folder(folder).encoder


def test_save_and_read_again(tokenizer, tmp_path):
    tokenizer.add_tokens(["<MyCat>", "Über Katze"])
    tokenizer.pad_id = 521
    (tmp_path / "tokenizer.json").write_text("stale")
    tokenizer.save(tmp_path)
    read = SimpleTokenizer.from_folder(tmp_path)
    assert (read.encoder, read.merges) == (tokenizer.encoder, tokenizer.merges)
    assert (read.pad_id, read.max_length) == (521, 77)
    np.testing.assert_array_equal(read.rows(["a <mycat>!"]), tokenizer.rows(["a <mycat>!"]))
    short = SimpleTokenizer.byte_level(pad_id=0, max_length=16)
    short.save(tmp_path / "new" / "tokenizer")
    read = SimpleTokenizer.from_folder(tmp_path / "new" / "tokenizer")
    assert (read.vocab, read.pad_id, read.max_length) == (short.vocab, 0, 16)


IDS = vocabulary.trained_ids(MERGES)
WITHOUT = {
    token: {key: index for index, key in enumerate(key for key in IDS if key != token)}
    for token in (END, "cat</w>", "x")
}


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("vocab.json", None, "vocab.json is missing"),
        ("merges.txt", None, "merges.txt is missing"),
        ("vocab.json", "", "vocab.json is malformed .JSONDecodeError"),
        ("vocab.json", as_json(IDS)[:2000], "vocab.json is malformed .JSONDecodeError"),
        ("vocab.json", '{"\xe9": 0}'.encode("latin-1"), "vocab.json is malformed .UnicodeDecode"),
        ("vocab.json", "[1, 2]", "vocab.json is malformed .*expected an object. Received: list"),
        ("vocab.json", '{"a":' * 100_000, "vocab.json is malformed .RecursionError"),
        ("vocab.json", as_json(IDS | {"x": 7}), "each once.*shared by: '.'"),
        ("vocab.json", as_json(IDS | {"x": 9_999}), "520 tokens must have the ids 0 to 519"),
        ("vocab.json", as_json(IDS | {"x": -1}), "Received: -1 to 519"),
        ("vocab.json", as_json(IDS | {"x": "7"}), "ids must be integers"),
        ("vocab.json", as_json(IDS | {"x": None}), "ids must be integers"),
        ("vocab.json", as_json(IDS | {"surplus": 520}), "none makes 'surplus'"),
        ("vocab.json", as_json(WITHOUT[END]), r"json: the vocabulary lacks '<\|endoftext\|>'"),
        ("vocab.json", as_json(WITHOUT["cat</w>"]), "the vocabulary lacks 'cat</w>'"),
        ("merges.txt", "#version: 0.2\nc a\n", "merges are missing: none makes 'cat</w>', 'th'"),
        ("merges.txt", "#version: 0.2\nc a\nx\n", "merges.txt is malformed .*must be two.*'x\\W"),
        ("merges.txt", "c a\nc a t\n", "merges.txt is malformed .*must be two"),
        ("merges.txt", b"\xff\xfe", "merges.txt is malformed .UnicodeDecodeError"),
        ("merges.txt", "c a\n" * 2, "1 merges are listed twice"),
        ("merges.txt", "q z\n", "lacks 'qz'"),
        ("tokenizer_config.json", "no", "tokenizer_config.json is malformed"),
        ("tokenizer_config.json", '{"pad_token": {}}', "tokenizer_config.json is malformed"),
        ("tokenizer_config.json", '{"pad_token": "[PAD]"}', "lacks the pad token '.PAD.'"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "config.json is malformed"),
        ("tokenizer_config.json", '{"pad_token": 3}', "a token must be a string. Received: 3"),
        ("special_tokens_map.json", "[]", "special_tokens_map.json is malformed"),
        ("added_tokens.json", '{"<x>": 3}', "each once"),
        ("added_tokens.json", '{"<x>": 600}', "520 tokens|521 tokens must have the ids"),
        ("added_tokens.json", '{"<x>": 520, "<X>": 521}', "more than case. Received: '<X>'"),
        ("added_tokens.json", "3", "added_tokens.json is malformed"),
        ("tokenizer.json", "{}", "tokenizer.json is malformed .KeyError"),
        ("tokenizer.json", '{"model": {"type": "Unigram"}}', "must be 'BPE'.*'Unigram'"),
        ("tokenizer.json", '{"model": {"vocab": {}, "merges": [1]}}', "malformed .TypeError"),
        ("tokenizer.json", '{"model": {"vocab": {}, "merges": [["a", 1]]}}', "must be two symbols"),
        ("tokenizer.json", '{"model": {"vocab": {}, "merges": []}}', "json: the vocabulary lacks"),
    ],
)
def test_malformed_folders_are_named(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message) as raised:
        SimpleTokenizer.from_folder(write_folder(tmp_path, **{name: content}))
    assert str(tmp_path) in str(raised.value) and re.search("Fetch|Rename", str(raised.value))


def test_folder_without_a_tokenizer(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match="must hold a tokenizer.json, or a vocab.json and"):
            SimpleTokenizer.from_folder(folder)


def test_files_beyond_the_limit_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(vocabulary, "MAX_FILE_BYTES", 1000)
    with pytest.raises(ValueError, match="vocab.json is malformed .*more than 1000 bytes"):
        SimpleTokenizer.from_folder(write_folder(tmp_path))
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(b" " * 10_000))
    with pytest.raises(ValueError, match="bomb.gz is malformed .*more than 1000 bytes"):
        SimpleTokenizer.from_bpe(tmp_path / "bomb.gz")


def write_bpe(path):
    lines = "".join(f"{first} {second}\n" for first, second in MERGES)
    path.write_bytes(gzip.compress(f'"bpe_simple_vocab_16e6.txt#version: 0.2\n{lines}'.encode()))
    return path


def test_bpe_file(tokenizer, tmp_path, monkeypatch):
    path = write_bpe(tmp_path / "bpe.txt.gz")
    read = SimpleTokenizer.from_bpe(path, pad_id=0, max_length=8)
    assert (read.encoder, read.merges) == (tokenizer.encoder, tokenizer.merges)
    assert (read.pad_id, read.max_length) == (0, 8)
    monkeypatch.setattr(vocabulary, "NUM_MERGES", 2)
    assert len(SimpleTokenizer.from_bpe(path).vocab) == 516


def test_malformed_bpe_files_are_named(tmp_path):
    content = write_bpe(tmp_path / "bpe.txt.gz").read_bytes()
    for wrong in (b"", b"text", content[:-12], content[:20] + b"??" + content[22:]):
        (tmp_path / "wrong.gz").write_bytes(wrong)
        with pytest.raises(ValueError, match="wrong.gz"):
            SimpleTokenizer.from_bpe(tmp_path / "wrong.gz")
    with pytest.raises(ValueError, match="absent.gz is missing"):
        SimpleTokenizer.from_bpe(tmp_path / "absent.gz")


# The default vocabulary

FETCH = """
import sys
from kdiffusion.text import vocabulary
from kdiffusion.text.tokenizer import SimpleTokenizer
vocabulary.URL, vocabulary.SHA256 = sys.argv[1:3]
for _ in range(2):
    tokenizer = SimpleTokenizer.default(pad_id=0)
print(tokenizer.encode("the cat"), tokenizer.pad_id)
"""


@pytest.fixture
def server(tmp_path):
    """A local server of a folder's files, with the paths that were asked for."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *_):
            requests.append(self.path)

    requests = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{running.server_port}", requests
        running.shutdown()
        thread.join()


def fetch(tmp_path, url, sha256):
    """Runs FETCH in a child: Keras reads KERAS_HOME when it is imported."""
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    environment = os.environ | {"KERAS_HOME": str(home), "no_proxy": "127.0.0.1"}
    environment.pop("KDIFFUSION_CLIP_VOCAB", None)
    command = [sys.executable, "-c", FETCH, url, sha256]
    root = Path(__file__).parents[2]
    return subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)


@pytest.mark.backend  # Keras fetches it
def test_the_vocabulary_is_fetched_once_and_verified(tmp_path, server):
    folder, address, requests = server
    content = write_bpe(folder / "bpe.gz").read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    child = fetch(tmp_path, f"{address}/bpe.gz", sha256)
    assert child.stdout.endswith("[518, 515, 513, 519] 0\n"), child.stderr
    assert (tmp_path / "home" / "datasets" / vocabulary.NAME).read_bytes() == content
    assert len(requests) == 1
    (folder / "bpe.gz").write_bytes(content + b"swapped")
    (tmp_path / "home" / "datasets" / vocabulary.NAME).unlink()
    child = fetch(tmp_path, f"{address}/bpe.gz", sha256)
    assert child.returncode == 1 and "ValueError: CLIP's vocabulary could not be" in child.stderr
    assert "set KDIFFUSION_CLIP_VOCAB to the path" in child.stderr.splitlines()[-1]


def test_the_variable_is_read_before_anything_is_fetched(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(vocabulary, "URL", "http://127.0.0.1:9/unreachable")
    monkeypatch.setenv("KDIFFUSION_CLIP_VOCAB", str(write_bpe(tmp_path / "bpe.txt.gz")))
    assert SimpleTokenizer.default().encoder == tokenizer.encoder
    monkeypatch.setenv("KDIFFUSION_CLIP_VOCAB", str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="KDIFFUSION_CLIP_VOCAB must name .*absent"):
        SimpleTokenizer.default()


def test_the_pinned_digest_is_that_of_the_file_in_use():
    path = os.environ.get("KDIFFUSION_CLIP_VOCAB")
    if not path:
        pytest.skip("KDIFFUSION_CLIP_VOCAB does not name bpe_simple_vocab_16e6.txt.gz")
    assert hashlib.sha256(Path(path).read_bytes()).hexdigest() == vocabulary.SHA256
