"""Models of the hub: what is fetched, what is kept, and what is said when something is wrong."""

import json
import os
import shutil
import warnings
from pathlib import Path

import hub_server
import pytest
from hub_server import REPOSITORY, drop, endless, lie, on, status, times

from kdiffusion.weights import hub, hub_errors
from kdiffusion.weights.hub import DownloadError, fetch

UNET = "unet/diffusion_pytorch_model.safetensors"
FILES = {
    "README.md": b"---\nlicense: creativeml-openrail-m\n---\nA model.\n",
    "LICENSE": b"The terms.\n",
    "model_index.json": b"{}",
    "scheduler/scheduler_config.json": b'{"a": 1}',
    "tokenizer/vocab.json": b"{}",
    "tokenizer/merges.txt": b"#version",
    "unet/config.json": b'{"b": 2}',
    UNET: bytes(range(256)) * 400,
    "vae/config.json": b'{"c": 3}',
    "vae/diffusion_pytorch_model.safetensors": b"vae" * 5000,
    "text_encoder/config.json": b'{"d": 4}',
    "text_encoder/model.safetensors": b"text" * 5000,
}
NOT_NEEDED = {
    "v1-5-pruned.safetensors": b"whole",
    "unet/diffusion_pytorch_model.bin": b"pickle",
    "unet/diffusion_pytorch_model.fp16.safetensors": b"half",
    "unet/diffusion_pytorch_model.non_ema.safetensors": b"raw",
    "vae/diffusion_pytorch_model.fp16.safetensors": b"half",
    "text_encoder/model.fp16.safetensors": b"half",
    "safety_checker/model.safetensors": b"checker",
    "unet/../../evil.safetensors": b"evil",
    "../README.md": b"evil",
}


@pytest.fixture
def server(connect):
    with hub_server.serving(FILES) as server:
        connect(server.address)
        yield server


def fetched(*arguments, **keywords):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fetch(*arguments, **keywords)


def content(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_what_a_model_needs_is_fetched_and_nothing_else(server):
    server.files |= NOT_NEEDED
    server.listed |= NOT_NEEDED
    path, variant = fetched(REPOSITORY)
    assert content(path) == FILES
    assert variant is None


def test_licence_and_size_are_told_when_a_download_begins(server):
    with pytest.warns(UserWarning, match="0 MB.*creativeml-openrail-m.*LICENSE, README.md"):
        path, _ = fetch(REPOSITORY)
    asked = len(server.requests)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fetch(REPOSITORY).path == path
    assert server.asked()[asked:] == [f"/api/models/{REPOSITORY}/revision/main"]


def test_a_preset_tells_its_own_licence(server):
    with pytest.warns(UserWarning, match="RAIL-M of the record"):
        fetch(REPOSITORY, licence="RAIL-M of the record")


def test_a_commit_in_the_cache_is_not_asked_for_again(server):
    path, _ = fetched(REPOSITORY, "v1")
    asked = len(server.requests)
    assert fetch(REPOSITORY, hub_server.COMMIT).path == path
    assert len(server.requests) == asked


def test_a_new_commit_fetches_only_what_changed(server):
    first, _ = fetched(REPOSITORY)
    server.files["unet/config.json"] = server.listed["unet/config.json"] = b"new"
    server.commit = "f" * 40
    before = server.sent
    second, _ = fetched(REPOSITORY)
    assert content(first) == FILES
    assert content(second) == FILES | {"unet/config.json": b"new"}
    assert server.sent - before < len(FILES[UNET])


@pytest.mark.parametrize(
    "changes, variant",
    [
        ({"unet/diffusion_pytorch_model.bin": b"pickle"}, None),
        (
            {
                "unet/diffusion_pytorch_model.fp16.safetensors": b"half",
                "vae/diffusion_pytorch_model.fp16.safetensors": b"half",
                "text_encoder/model.fp16.safetensors": b"half",
            },
            "fp16",
        ),
        (
            {
                "unet/diffusion_pytorch_model.safetensors.index.json": b"{}",
                "unet/diffusion_pytorch_model-00001-of-00002.safetensors": b"one",
                "unet/diffusion_pytorch_model-00002-of-00002.safetensors": b"two",
            },
            None,
        ),
    ],
    ids=["bin", "fp16", "shards"],
)
def test_other_weights_are_taken_where_there_are_no_better_ones(server, changes, variant):
    files = {name: content for name, content in FILES.items() if name != UNET} | changes
    server.files, server.listed = dict(files), dict(files)
    path, found = fetched(REPOSITORY)
    wanted = (
        files
        if variant is None
        else {
            name: content
            for name, content in files.items()
            if name in changes or not name.endswith(".safetensors")
        }
    )
    assert content(path) == wanted
    assert found == variant


def test_a_missing_shard_is_named(server):
    del server.listed[UNET]
    server.listed |= {
        "unet/diffusion_pytorch_model.safetensors.index.json": b"{}",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors": b"one",
    }
    with pytest.raises(DownloadError, match="model-00002-of-00002.safetensors"):
        fetched(REPOSITORY)


def test_a_repository_of_single_files_says_what_to_do(server):
    server.listed = {"v1-5-pruned.safetensors": b"whole"}
    with pytest.raises(DownloadError, match="model_index.json.*pass its path"):
        fetched(REPOSITORY)


def test_models_without_texts_are_fetched_too(server):
    others = {name: file for name, file in FILES.items() if name[:4] not in ("text", "toke")}
    server.files, server.listed = dict(others), dict(others)
    assert content(fetched(REPOSITORY).path) == others


def test_an_index_tells_of_parts_that_were_not_begun(server, connect):
    index = {"unet": ["diffusers", "UNet2DConditionModel"], "safety_checker": [None, None]}
    server.files |= {"model_index.json": json.dumps(index).encode()}
    server.listed |= {"model_index.json": json.dumps(index).encode()}
    path, _ = fetched(REPOSITORY)
    shutil.rmtree(path / "unet")
    connect("http://127.0.0.1:9", offline=True)
    with pytest.raises(DownloadError, match="is not complete in .*: missing files: 'unet/"):
        fetch(REPOSITORY)


def test_a_cut_line_goes_on_where_it_was_cut(server):
    server.faults = [times(1, on(UNET, drop(60_000)))]
    path, _ = fetched(REPOSITORY)
    assert content(path) == FILES
    assert "bytes=60000-" in [wanted for _, name, wanted, _ in server.requests if name == UNET]


def test_an_interrupted_download_goes_on_in_another_process(server, monkeypatch):
    server.faults = [on(UNET, drop(0))]
    with pytest.raises(DownloadError, match="try again and it goes on"):
        fetched(REPOSITORY)
    partial = next(Path(hub_cache()).rglob("blobs/*.incomplete"))
    partial.write_bytes(FILES[UNET][:70_000])
    server.faults = []
    assert content(fetched(REPOSITORY).path) == FILES
    assert server.requests[-1][2] == "bytes=70000-"


def hub_cache():
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE


@pytest.mark.parametrize(
    "bytes_instead, words",
    [
        (b"<!DOCTYPE html><title>Sign in</title>", "web page"),
        (FILES[UNET][::-1], "digest"),
        (FILES[UNET][:-1], "102,399 of 102,400 bytes"),
        (FILES[UNET] + b"more", "bytes"),
    ],
    ids=["page", "swapped", "short", "long"],
)
def test_damage_is_never_kept(server, bytes_instead, words):
    server.faults = [on(UNET, lie(bytes_instead))]
    with pytest.raises(DownloadError, match=f"{UNET}.*damaged, twice: .*{words}"):
        fetched(REPOSITORY)
    for path in Path(hub_cache()).rglob("*"):
        if path.is_file():
            assert path.read_bytes() not in (bytes_instead, bytes_instead[: len(FILES[UNET])])
    server.faults = []
    assert content(fetched(REPOSITORY).path) == FILES


def test_damage_that_happens_once_is_mended(server):
    server.faults = [times(1, on(UNET, lie(FILES[UNET][::-1])))]
    assert content(fetched(REPOSITORY).path) == FILES


def test_a_partial_file_of_other_bytes_is_begun_anew(server):
    server.faults = [on(UNET, drop(0))]
    with pytest.raises(DownloadError):
        fetched(REPOSITORY)
    partial = next(Path(hub_cache()).rglob("blobs/*.incomplete"))
    partial.write_bytes(b"other" * 10_000)
    server.faults = []
    assert content(fetched(REPOSITORY).path) == FILES


def test_a_file_that_was_cut_in_the_cache_is_fetched_again(server):
    path, _ = fetched(REPOSITORY)
    blob = (path / UNET).resolve()
    blob.write_bytes(FILES[UNET][:1000])
    assert content(fetched(REPOSITORY).path) == FILES


def test_an_endless_answer_ends(server):
    server.faults = [on(UNET, endless)]
    with pytest.raises(DownloadError, match="damaged"):
        fetched(REPOSITORY)


@pytest.mark.parametrize(
    "kind, code, error, words",
    [
        ("api", 401, "RepoNotFound", "does not exist, or is private"),
        ("api", 401, None, "HF_TOKEN"),
        ("api", 403, None, "HF_TOKEN"),
        ("api", 404, "RepoNotFound", "does not exist, or is private"),
        ("api", 404, "RevisionNotFound", "no such revision"),
        ("api", 429, None, "too many requests.*Try again later"),
        ("api", 503, None, "the hub fails"),
        ("resolve", 403, "GatedRepo", "Accept its terms in a browser"),
        ("resolve", 404, "EntryNotFound", "has lost a file"),
        ("resolve", 502, None, "the hub fails"),
    ],
)
def test_refusals_say_what_to_do(server, kind, code, error, words):
    server.faults = [on(kind, status(code, error))]
    with pytest.raises(DownloadError, match=words) as raised:
        fetched(REPOSITORY)
    assert REPOSITORY in str(raised.value) and "\n" not in str(raised.value)
    server.faults = []
    assert content(fetched(REPOSITORY).path) == FILES


def test_waiting_is_as_long_as_the_hub_asks(server, monkeypatch):
    waited = []
    monkeypatch.setattr(hub_errors.time, "sleep", waited.append)
    server.faults = [times(2, on("api", status(429, Retry_After="7")))]
    assert content(fetched(REPOSITORY).path) == FILES
    assert waited == [7, 7]
    server.commit = "e" * 40
    server.faults = [on("api", status(429, Retry_After="3600"))]
    with pytest.raises(DownloadError, match="asks to wait 3,600 seconds"):
        fetch("someone/else", "main")


def test_a_page_instead_of_a_listing(server):
    server.faults = [on("api", lie(b"<html>Sign in to this network</html>"))]
    with pytest.raises(DownloadError, match="does not answer as a hub"):
        fetched(REPOSITORY)


def test_a_commit_that_is_a_path_is_refused(server):
    server.commit = "../../elsewhere"
    with pytest.raises(DownloadError, match="does not answer as a hub"):
        fetched(REPOSITORY)


@pytest.mark.parametrize("revision", ["../x", "a/../../b", "/etc", ""])
def test_a_revision_that_is_a_path_is_refused(connect, revision):
    connect("http://127.0.0.1:9", offline=True)
    with pytest.raises(DownloadError, match="A revision is|is not complete"):
        fetch(REPOSITORY, revision)


def test_a_listing_without_digests_is_refused(server):
    server.digest = lambda content, name: ""
    with pytest.raises(DownloadError, match="cannot be verified"):
        fetched(REPOSITORY)


@pytest.mark.parametrize("name", ["a/b/c", "no spaces", ""])
def test_what_is_no_address_is_said(server, name):
    with pytest.raises(DownloadError, match="no address on the hub|organisation/repository"):
        fetch(name)


def test_without_a_hub_the_cache_is_used(server, connect):
    path, _ = fetched(REPOSITORY)
    connect("http://127.0.0.1:9")
    with pytest.warns(UserWarning, match="cannot be reached.*The copy in the cache is used"):
        assert fetch(REPOSITORY).path == path


def test_without_a_hub_or_a_cache_there_is_an_error(connect):
    connect("http://127.0.0.1:9")
    with pytest.raises(DownloadError, match="127.0.0.1:9 cannot be reached"):
        fetch(REPOSITORY)


def test_offline_nobody_is_asked(server, connect):
    with pytest.raises(DownloadError):
        connect("http://127.0.0.1:9", offline=True)
        fetch(REPOSITORY)
    connect(server.address)
    path, _ = fetched(REPOSITORY)
    asked = len(server.requests)
    connect(server.address, offline=True)
    assert fetch(REPOSITORY).path == path
    (path / UNET).unlink()
    with pytest.raises(DownloadError, match=f"{REPOSITORY}.*not complete.*unet/.*HF_HUB_OFFLINE"):
        fetch(REPOSITORY)
    assert len(server.requests) == asked


def test_a_disk_that_is_too_small_is_found_out_first(server, monkeypatch):
    usage = hub.shutil.disk_usage("/")
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DownloadError, match="does not fit on the disk.*bytes are needed.*HF_HOME"):
        fetched(REPOSITORY)
    assert server.asked("resolve") == []


def test_a_disk_that_fills_up(server, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub._Bounded, "write", full)
    with pytest.raises(DownloadError, match="does not fit on the disk"):
        fetched(REPOSITORY)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_may_not_be_written(server, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(DownloadError, match="cannot be kept in.*HF_HOME"):
        fetched(REPOSITORY)


def test_a_token_goes_to_the_hub_and_is_never_told(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.faults = [on(UNET, lie(b"short"))]
    with pytest.warns(UserWarning) as told, pytest.raises(DownloadError) as raised:
        fetch(REPOSITORY)
    assert "Bearer hf_secret" in {authorization for *_, authorization in server.requests}
    assert not any("hf_secret" in str(item) for item in [raised.value, *told])
