"""Folders in diffusers' layout: variants, shards, what is refused, and atomic writing."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
from corpus.pickles import archive, dictionary, floats
from safetensors.numpy import load_file, save_file

from weights_conversion import (
    CheckpointError,
    CheckpointLimit,
    CheckpointMismatch,
    CorruptCheckpoint,
    DiffusersFolder,
    UnsafeCheckpoint,
    open_safetensors,
    staged,
    write_component,
    write_index,
    write_scheduler,
)
from weights_conversion.files.limits import Limits
from weights_conversion.models.folder import LAYOUT_VERSION

UNET = {"_class_name": "UNet2DConditionModel"}
TENSORS = {name: np.full((2, 3), value, np.float32) for value, name in enumerate("abcde")}


def save(path, tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


def write_shards(folder, index, shards, weight_map=None):
    """Save {file: tensors} and an index of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, tensors in shards.items():
        save(folder / file, tensors)
    if weight_map is None:
        weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def one(value):
    return {f"x{value}": np.full(1, value, np.float32)}


# ── reading ───────────────────────────────────────────────────────────────────────────────────


def test_configs_and_index(tmp_path):
    write_component(tmp_path, "unet", UNET | {"in_channels": 9}, TENSORS)
    write_scheduler(tmp_path, {"_class_name": "DDIMScheduler"})
    write_index(tmp_path)
    folder = DiffusersFolder(tmp_path)
    assert folder.config("unet")["in_channels"] == 9
    assert folder.config("scheduler") == {"_class_name": "DDIMScheduler"}
    assert folder.index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert folder.has("unet")
    assert not folder.has("vae")


def test_a_component_that_the_index_switches_off(tmp_path):
    (tmp_path / "safety_checker").mkdir()
    (tmp_path / "model_index.json").write_text('{"safety_checker": [null, null]}')
    assert not DiffusersFolder(tmp_path).has("safety_checker")


@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "model"])
@pytest.mark.parametrize("variant", [None, "fp16", "non_ema"])
def test_single_files_and_variants(tmp_path, stem, variant):
    for value, part in enumerate(["", ".fp16", ".non_ema"]):
        save(tmp_path / "unet" / f"{stem}{part}.safetensors", one(value))
    checkpoint = DiffusersFolder(tmp_path).weights("unet", variant)
    assert list(checkpoint) == [f"x{[None, 'fp16', 'non_ema'].index(variant)}"]


@pytest.mark.parametrize(
    "index, variant",
    [
        ("model.safetensors.index.json", None),
        ("model.safetensors.index.fp16.json", "fp16"),
        ("model.fp16.safetensors.index.json", "fp16"),
    ],
)
def test_shards_in_both_orders_of_the_index_name(tmp_path, index, variant):
    dotted = f".{variant}" if variant else ""
    shards = {f"model{dotted}-0000{n}-of-00002.safetensors": one(n) for n in (1, 2)}
    write_shards(tmp_path / "text_encoder", index, shards)
    checkpoint = DiffusersFolder(tmp_path).weights("text_encoder", variant)
    assert set(checkpoint) == {"x1", "x2"}
    assert checkpoint.info("x2").shape == (1,)
    assert checkpoint["x2"][0] == 2
    assert checkpoint.path.name == index


def pickled(value):
    return archive(dictionary(**{f"x{value}": floats("0", (1,))}), {"0": np.float32([value])})


@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "pytorch_model"])
def test_files_of_pytorch_where_there_are_no_others(tmp_path, stem):
    folder = tmp_path / "unet"
    folder.mkdir()
    (folder / f"{stem}.fp16.bin").write_bytes(pickled(3))
    assert DiffusersFolder(tmp_path).weights("unet", "fp16")["x3"] == [3]
    with pytest.raises(CheckpointMismatch, match="without a variant, but .*model.fp16.bin"):
        DiffusersFolder(tmp_path).weights("unet")
    (folder / f"{stem}-00001-of-00002.bin").write_bytes(pickled(1))
    (folder / f"{stem}-00002-of-00002.bin").write_bytes(pickled(2))
    index = {"weight_map": {f"x{n}": f"{stem}-0000{n}-of-00002.bin" for n in (1, 2)}}
    (folder / f"{stem}.bin.index.json").write_text(json.dumps(index))
    checkpoint = DiffusersFolder(tmp_path).weights("unet")
    assert (checkpoint["x1"], checkpoint["x2"]) == ([1], [2])
    save(folder / "diffusion_pytorch_model.safetensors", one(9))
    assert list(DiffusersFolder(tmp_path).weights("unet")) == ["x9"]


def test_missing_variant_lists_those_there(tmp_path):
    save(tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors", one(0))
    folder = DiffusersFolder(tmp_path)
    with pytest.raises(CheckpointMismatch, match="without a variant, but .*model.fp16.safe"):
        folder.weights("unet")
    with pytest.raises(CheckpointMismatch, match="of variant 'ema', but"):
        folder.weights("unet", "ema")


def test_missing_weights(tmp_path):
    folder = DiffusersFolder(tmp_path)
    with pytest.raises(CheckpointMismatch, match="Expected one of .*model.safetensors"):
        folder.weights("unet")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "diffusion_flax_model.msgpack").write_bytes(b"")
    with pytest.raises(CheckpointMismatch, match="no safetensors files, but"):
        folder.weights("unet")


def test_git_lfs_pointer_in_a_folder(tmp_path):
    (tmp_path / "unet").mkdir()
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n"
    (tmp_path / "unet" / "model.safetensors").write_text(pointer)
    with pytest.raises(CorruptCheckpoint, match="git lfs pull"):
        DiffusersFolder(tmp_path).weights("unet")


@pytest.mark.parametrize(
    "content, error",
    [
        ("{", CorruptCheckpoint),
        ("[]", CorruptCheckpoint),
        (b"\xff{}", CorruptCheckpoint),
        ('{"x":' * 100_000, CorruptCheckpoint),
        (" " * 25_000_001, CheckpointLimit),
        (None, CheckpointError),
    ],
)
def test_bad_json(tmp_path, content, error):
    if content is not None:
        content = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "model_index.json").write_bytes(content)
    with pytest.raises(error, match="model_index.json"):
        DiffusersFolder(tmp_path).index


def test_tokenizer_files(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    for name in ("vocab.json", "merges.txt", "other.txt"):
        (tmp_path / "tokenizer" / name).write_text("{}")
    files = DiffusersFolder(tmp_path).tokenizer_files()
    assert files == {
        "vocab.json": tmp_path / "tokenizer" / "vocab.json",
        "merges.txt": tmp_path / "tokenizer" / "merges.txt",
    }


# ── an index that lies ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "name",
    ["../x", "../unet/x", "/etc/passwd", "sub/x", "sub\\x", "C:x", "", ".", "..", "x\0", "./x"],
)
def test_an_index_must_not_leave_its_folder(tmp_path, name):
    write_shards(tmp_path / "unet", "model.safetensors.index.json", {}, {"x": name})
    with pytest.raises(UnsafeCheckpoint, match="not beside it"):
        DiffusersFolder(tmp_path).weights("unet")


def test_a_link_must_not_leave_the_folder(tmp_path):
    save(tmp_path / "elsewhere" / "secret.safetensors", one(1))
    unet = tmp_path / "model" / "unet"
    write_shards(unet, "model.safetensors.index.json", {}, {"x1": "x"})
    (unet / "x").symlink_to(tmp_path / "elsewhere" / "secret.safetensors")
    with pytest.raises(UnsafeCheckpoint, match="not beside it"):
        DiffusersFolder(tmp_path / "model").weights("unet")


def test_the_hubs_cache_links_to_its_blobs(tmp_path):
    save(tmp_path / "blobs" / "0123abc", one(1))
    unet = tmp_path / "snapshots" / "f00" / "unet"
    write_shards(unet, "model.safetensors.index.json", {}, {"x1": "a.safetensors"})
    (unet / "a.safetensors").symlink_to("../../../blobs/0123abc")
    assert DiffusersFolder(tmp_path / "snapshots" / "f00").weights("unet")["x1"][0] == 1


@pytest.mark.parametrize(
    "weight_map, error, message",
    [
        ({"x1": "a", "x2": "missing"}, CorruptCheckpoint, "'missing', which is missing"),
        ({"x1": "a", "x3": "a", "x2": "b"}, CorruptCheckpoint, "do not agree on 'x3'"),
        ({"x1": "a", "x2": "a"}, CorruptCheckpoint, "do not agree on 'x2'"),
        ({"x1": "a"}, None, ""),
        ({"x1": 3}, CorruptCheckpoint, "no weight_map"),
        (["x1"], CorruptCheckpoint, "no weight_map"),
        ({str(n): "a" for n in range(Limits().tensors + 1)}, CheckpointLimit, "50,001 tensors"),
    ],
)
def test_index_and_shards_must_agree(tmp_path, weight_map, error, message):
    shards = {"a": one(1), "b": one(2)}
    write_shards(tmp_path / "unet", "model.safetensors.index.json", shards, weight_map)
    folder = DiffusersFolder(tmp_path)
    if error is None:
        assert list(folder.weights("unet")) == ["x1"]
        return
    with pytest.raises(error, match=message):
        folder.weights("unet")


def test_a_tensor_in_two_shards(tmp_path):
    shards = {"a": one(1) | one(2), "b": one(2)}
    write_shards(tmp_path / "unet", "model.safetensors.index.json", shards, {"x1": "a", "x2": "b"})
    with pytest.raises(CorruptCheckpoint, match="do not agree on 'x2'"):
        DiffusersFolder(tmp_path).weights("unet")


# ── writing ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("max_shard_bytes, files", [(1000, 1), (48, 3), (1, 5)])
def test_what_is_written_is_read(tmp_path, variant, max_shard_bytes, files):
    write_component(
        tmp_path, "unet", UNET, TENSORS, variant=variant, max_shard_bytes=max_shard_bytes
    )
    written = sorted((tmp_path / "unet").glob("*.safetensors"))
    assert len(written) == files
    assert all(path.stat().st_size < max_shard_bytes + 700 for path in written)
    checkpoint = DiffusersFolder(tmp_path).weights("unet", variant)
    assert set(checkpoint) == set(TENSORS)
    assert checkpoint.metadata == {"format": "pt"}
    for name, array in TENSORS.items():
        np.testing.assert_array_equal(checkpoint[name], array)


def test_names_of_written_files(tmp_path):
    write_component(tmp_path, "unet", UNET, TENSORS, variant="fp16", max_shard_bytes=72)
    assert sorted(os.listdir(tmp_path / "unet")) == [
        "config.json",
        "diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        "diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
        "diffusion_pytorch_model.safetensors.index.fp16.json",
    ]
    write_component(tmp_path, "text_encoder", {"architectures": ["CLIPTextModel"]}, TENSORS)
    assert sorted(os.listdir(tmp_path / "text_encoder")) == ["config.json", "model.safetensors"]


def test_views_and_half_types_are_written(tmp_path):
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    tensors = {
        "view": array.transpose(2, 0, 1)[::2],
        "bfloat16": array.astype(ml_dtypes.bfloat16),
        "scalar": np.float32(3),
    }
    write_component(tmp_path, "unet", UNET, tensors)
    path = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    checkpoint = open_safetensors(path)
    for name, expected in load_file(path).items():
        np.testing.assert_array_equal(checkpoint[name], np.asarray(tensors[name]))
        np.testing.assert_array_equal(expected, np.asarray(tensors[name]))
    assert checkpoint.info("bfloat16").dtype == ml_dtypes.bfloat16
    assert checkpoint.info("scalar").shape == ()


def test_a_failure_leaves_nothing_behind(tmp_path):
    tensors = TENSORS | {"broken": np.zeros(2, object)}
    with pytest.raises(Exception, match="object"):
        write_component(tmp_path, "unet", UNET, tensors, max_shard_bytes=1)
    assert os.listdir(tmp_path) == []
    with pytest.raises(TypeError):
        write_component(tmp_path, "unet", {"sample_size": np.float32(3)}, TENSORS)
    assert os.listdir(tmp_path) == []
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "model") as folder:
        write_component(folder, "unet", UNET, TENSORS)
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_nothing_is_overwritten(tmp_path):
    write_component(tmp_path, "unet", UNET, TENSORS)
    with pytest.raises(CheckpointError, match="exists already"):
        write_component(tmp_path, "unet", UNET, one(1))
    assert set(DiffusersFolder(tmp_path).weights("unet")) == set(TENSORS)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="exists already"), staged(tmp_path / "file"):
        pass


def test_a_whole_pipeline_is_staged(tmp_path):
    path = tmp_path / "new" / "model"
    with staged(path) as folder:
        write_component(folder, "unet", UNET, TENSORS)
        write_component(folder, "text_encoder", {"architectures": ["CLIPTextModel"]}, TENSORS)
        write_scheduler(folder, {"_class_name": "DDIMScheduler"})
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "vocab.json").write_text("{}")
        write_index(folder)
        assert not path.exists()
    assert json.loads((path / "model_index.json").read_text()) == {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": LAYOUT_VERSION,
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
    }
    assert os.listdir(path.parent) == ["model"]
    with staged(tmp_path / "empty") as folder:
        pass
    with staged(tmp_path / "empty") as folder:  # an empty folder may stand there
        (folder / "x").write_text("")
    assert os.listdir(tmp_path / "empty") == ["x"]
