"""Conversion of whole models, and the command line over it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from corpus.models import FIELDS, KINDS, averaged, pickled, tensors, training_leftovers
from safetensors.numpy import load_file, save_file

from weights_conversion import (
    CheckpointError,
    CheckpointMismatch,
    DiffusersFolder,
    NonFiniteWeights,
    convert,
    inspect,
    open_model,
    open_safetensors,
)
from weights_conversion.cli import main
from weights_conversion.files.checkpoint import in_memory
from weights_conversion.files.safetensors_writer import write_safetensors
from weights_conversion.files.staging import removed_if_killed

KINDS_OF = {"unet": ["diffusion_model"], "vae": ["image_encoder", "image_decoder"]}


@pytest.fixture
def sd1(tmp_path):
    path = tmp_path / "sd1.ckpt"
    found = tensors("sd1")
    path.write_bytes(pickled(found | averaged(found) | training_leftovers()))
    return path


def saved(path, found, metadata=None):
    save_file(found, path, metadata)
    return path


def tokenizer(folder):
    folder.mkdir()
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_text("{}")
    return folder


def check_folder(path, family, dtype=np.float32):
    folder = DiffusersFolder(path)
    for component in ("unet", "vae", "text_encoder"):
        kinds = [kind for kind, own in KINDS.items() if own == component]
        expected = tensors(family, kinds, dtype=dtype, dialect="diffusers")
        found = folder.weights(component)
        assert set(found) == set(expected)
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array, strict=True)


# ── conversion ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", FIELDS)
def test_round_trip_is_exact(tmp_path, family):
    original = tensors(family)
    prediction = {"modelspec.prediction_type": "v" if family == "sd2" else "epsilon"}
    source = open_model(saved(tmp_path / "a.safetensors", original, prediction))
    report = convert(source, tmp_path / "folder", tokenizer=tokenizer(tmp_path / "words"))
    assert report.dropped == []
    check_folder(tmp_path / "folder", family)
    folder = open_model(tmp_path / "folder")
    assert folder.schedule["prediction"] == prediction["modelspec.prediction_type"]
    for kind, component in KINDS.items():
        assert folder.fields(kind) == FIELDS[family][component]
    report = convert(folder, tmp_path / "b.safetensors")
    assert report.dropped == ["scheduler/", "tokenizer/"]
    assert open_safetensors(report.path).metadata == {"format": "pt", **prediction}
    found = load_file(report.path)
    assert found.keys() == original.keys()
    for name, array in original.items():
        np.testing.assert_array_equal(found[name], array, strict=True)


def test_what_is_dropped_is_listed(tmp_path, sd1):
    report = convert(open_model(sd1, weights="raw"), tmp_path / "folder")
    missing = report.dropped.pop()
    assert missing.startswith("tokenizer/")
    found = tensors("sd1")
    assert set(report.dropped) == {*averaged(found), *training_leftovers()}
    check_folder(tmp_path / "folder", "sd1")
    assert DiffusersFolder(tmp_path / "folder").index["unet"][1] == "UNet2DConditionModel"


def test_the_moving_average_is_taken(tmp_path, sd1):
    convert(open_model(sd1), tmp_path / "a.safetensors")
    found = load_file(tmp_path / "a.safetensors")
    expected = averaged(tensors("sd1"))["model_ema.diffusion_modelout2weight"]
    np.testing.assert_array_equal(found["model.diffusion_model.out.2.weight"], expected)
    assert found.keys() == tensors("sd1").keys()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype_and_shards(tmp_path, dtype):
    source = open_model(saved(tmp_path / "a.safetensors", tensors("sd1")))
    convert(source, tmp_path / "folder", dtype=dtype, max_shard_bytes=200_000)
    unet = DiffusersFolder(tmp_path / "folder").weights("unet")
    assert unet.path.name == "diffusion_pytorch_model.safetensors.index.json"
    expected = tensors("sd1", ["diffusion_model"], dialect="diffusers")
    assert set(unet) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(unet[name], array.astype(getattr(ml_dtypes, dtype, dtype)))


def test_half_precision_overflow_is_named(tmp_path):
    found = tensors("sd1")
    found["model.diffusion_model.out.2.bias"][0] = 1e6
    source = open_model(saved(tmp_path / "a.safetensors", found))
    with pytest.raises(NonFiniteWeights, match="float16.*conv_out.bias"):
        convert(source, tmp_path / "folder", dtype="float16")
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors"]


def test_scale_and_facts_that_shapes_do_not_tell(tmp_path):
    source = open_model(
        saved(tmp_path / "a.safetensors", tensors("sd1") | {"scale_factor": np.float32(0.5)[None]})
    )
    assert source.fields("image_decoder")["latent_scale"] == 0.18215  # not a scalar
    scaled = tensors("sd1") | {"scale_factor": np.array(0.5, np.float32)}
    convert(open_model(saved(tmp_path / "b.safetensors", scaled)), tmp_path / "folder")
    config = tmp_path / "folder" / "unet" / "config.json"
    config.write_text(config.read_text().replace('_head_dim": 8', '_head_dim": 4'))
    report = convert(open_model(tmp_path / "folder"), tmp_path / "c.safetensors")
    assert "diffusion_model's num_heads: open with config=" in report.dropped
    again = open_model(tmp_path / "c.safetensors", config=tmp_path / "folder")
    assert again.fields("diffusion_model")["num_heads"] == (4, 4)
    assert open_model(tmp_path / "c.safetensors").fields("image_decoder")["latent_scale"] == 0.5


def test_errors_of_configs_name_the_folder(tmp_path, sd1):
    convert(open_model(sd1), tmp_path / "folder")
    config = tmp_path / "folder" / "unet" / "config.json"
    config.write_text(config.read_text().replace('"norm_eps": 1e-05', '"norm_eps": 7'))
    with pytest.raises(CheckpointMismatch, match="folder.unet.*norm_eps = 7"):
        open_model(tmp_path / "folder").fields("diffusion_model")
    with pytest.raises(CheckpointMismatch, match="folder.unet.*norm_eps = 7"):
        open_model(sd1, config=tmp_path / "folder").fields("diffusion_model")


def test_zero_terminal_snr_is_kept(tmp_path):
    marks = {"ztsnr": np.empty(0, np.float32), "v_pred": np.empty(0, np.float32)}
    source = open_model(saved(tmp_path / "a.safetensors", tensors("sd1") | marks))
    convert(source, tmp_path / "b.safetensors")
    schedule = open_model(tmp_path / "b.safetensors").schedule
    assert schedule["rescale_zero_terminal_snr"]
    assert schedule["prediction"] == "v"


def test_refusals(tmp_path, sd1):
    source = open_model(sd1)
    with pytest.raises(CheckpointMismatch, match="pickle"):
        convert(source, tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match="float32, float16, bfloat16"):
        convert(source, tmp_path / "b.safetensors", dtype="int8")
    (tmp_path / "b.safetensors").write_text("")
    with pytest.raises(CheckpointError, match="exists already"):
        convert(source, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointMismatch, match="pruned"):
        pruned = tensors("sd1", ["diffusion_model"])
        convert(open_model(saved(tmp_path / "c.safetensors", pruned)), tmp_path / "d")
    assert sorted(os.listdir(tmp_path)) == ["b.safetensors", "c.safetensors", "sd1.ckpt"]


def test_a_full_disk_is_seen_before(tmp_path, sd1, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match="are free there"):
        convert(open_model(sd1), tmp_path / "b.safetensors")


def test_one_tensor_at_a_time(tmp_path):
    import tracemalloc

    found = tensors("sd1")
    path = saved(tmp_path / "a.safetensors", found)
    largest = max(array.nbytes for array in found.values())
    del found
    tracemalloc.start()
    convert(open_model(path), tmp_path / "folder", dtype="float16")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * largest + 2_000_000 < path.stat().st_size


def test_the_writers_bytes_are_the_librarys(tmp_path):
    found = {name: array for name, array in tensors("sd1").items() if ".out." in name}
    found |= {f"half.{name}": array.astype(np.float16) for name, array in found.items()}
    save_file(found, tmp_path / "library", {"format": "pt"})
    write_safetensors(tmp_path / "own", in_memory(found))
    assert (tmp_path / "own").read_bytes() == (tmp_path / "library").read_bytes()


def test_what_no_file_can_hold(tmp_path):
    with pytest.raises(CheckpointMismatch, match="dtype object"):
        write_safetensors(tmp_path / "x", in_memory({"x": np.zeros(2, object)}))


# ── the command line ──────────────────────────────────────────────────────────────────────────


def test_inspect(sd1, capsys, monkeypatch):
    monkeypatch.setattr(
        "weights_conversion.files.checkpoint.Checkpoint.__getitem__",
        lambda *args: pytest.fail("reads"),
    )
    assert main(["inspect", "--json", str(sd1)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["family"] == "Stable Diffusion 1"
    assert told["format"] == "PyTorch"
    assert told["prediction"] == "epsilon"
    assert set(told["parts"]) == {
        "diffusion model",
        "moving average",
        "autoencoder",
        "text encoder",
        "other",
    }
    unet = tensors("sd1", ["diffusion_model"])
    assert told["parts"]["diffusion model"] == {
        "tensors": len(unet),
        "parameters": sum(array.size for array in unet.values()),
        "bytes": sum(array.nbytes for array in unet.values()),
        "dtypes": {"float32": len(unet)},
    }
    assert main(["inspect", str(sd1)]) == 0
    assert "family: Stable Diffusion 1\n" in capsys.readouterr().out


def test_inspect_of_other_things(tmp_path, sd1, capsys):
    convert(open_model(sd1), tmp_path / "folder")
    assert inspect(tmp_path / "folder")["parts"]["vae"]["tensors"] == len(
        tensors("sd1", KINDS_OF["vae"])
    )
    found = {"lora_unet_x.lora_down.weight": np.zeros((2, 2), np.float32)}
    lora = saved(tmp_path / "l.safetensors", found)
    told = inspect(lora)
    assert "LoRA" in told["family"]
    assert "base model" in told["use"]
    sd2 = saved(tmp_path / "2.safetensors", tensors("sd2"))
    assert inspect(sd2)["prediction"] is None
    (tmp_path / "broken.ckpt").write_bytes(b"\x80\x02")
    assert main(["inspect", str(tmp_path / "broken.ckpt")]) == 1
    assert "error: " in capsys.readouterr().err


def test_convert_and_its_options(tmp_path, sd1, capsys):
    words = tokenizer(tmp_path / "words")
    command = ["convert", str(sd1), str(tmp_path / "folder"), "--weights", "raw"]
    assert main([*command, "--dtype", "bfloat16", "--tokenizer", str(words)]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == str(tmp_path / "folder")
    assert "100% of" in err
    assert "dropped: 'alphas_cumprod'\n" in err
    check_folder(tmp_path / "folder", "sd1", ml_dtypes.bfloat16)
    assert (tmp_path / "folder" / "tokenizer" / "merges.txt").is_file()
    assert main(command) == 1
    assert "exists already" in capsys.readouterr().err


def test_repair(tmp_path, capsys):
    path = saved(tmp_path / "a.safetensors", tensors("sd1"), {"about": "me"})
    path.write_bytes(path.read_bytes() + b"trailing")
    assert main(["inspect", str(path)]) == 1
    assert "weights_conversion repair" in capsys.readouterr().err
    assert main(["repair", str(path), str(tmp_path / "b.safetensors")]) == 0
    repaired = open_safetensors(tmp_path / "b.safetensors")
    assert repaired.metadata == {"format": "pt", "about": "me"}
    for name, array in tensors("sd1").items():
        np.testing.assert_array_equal(repaired[name], array, strict=True)


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
@pytest.mark.parametrize("destination", ["folder", "b.safetensors"])
def test_a_killed_conversion_leaves_nothing(tmp_path, sd1, destination):
    slow = (
        "import sys, time, weights_conversion.models.conversion as c\n"
        "model = c.open_model(sys.argv[1])\n"
        "c.convert(model, sys.argv[2], progress=lambda *a: (print(*a, flush=True), time.sleep(60)))"
    )
    command = [sys.executable, "-c", slow, str(sd1), str(tmp_path / destination)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout.readline()
        assert len(os.listdir(tmp_path)) == 2
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 60
    while len(os.listdir(tmp_path)) > 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert os.listdir(tmp_path) == ["sd1.ckpt"]


def test_what_is_finished_is_not_removed(tmp_path):
    path = tmp_path / "x"
    path.write_text("")
    with removed_if_killed(path):
        pass
    assert path.exists()


def test_the_module_is_a_command(sd1):
    command = [sys.executable, "-m", "weights_conversion", "inspect", str(sd1)]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert result.returncode == 0
    assert "Stable Diffusion 1" in result.stdout


def test_a_folder_s_licence_is_told_and_goes_with_its_weights(tmp_path, sd1, capsys):
    words = tokenizer(tmp_path / "words")
    convert(open_model(sd1), tmp_path / "folder", tokenizer=words)
    assert "licence" not in inspect(tmp_path / "folder")["metadata"]
    terms = {"README.md": "---\ntags: [a]\nlicense: 'openrail++'\n---\n# A model\n", "LICENSE": "x"}
    for name, text in terms.items():
        (tmp_path / "folder" / name).write_text(text)
    (tmp_path / "folder" / "notice.md").mkdir()
    convert(open_model(tmp_path / "folder"), tmp_path / "copy")
    for name, text in terms.items():
        assert (tmp_path / "copy" / name).read_text() == text
    assert main(["inspect", str(tmp_path / "copy")]) == 0
    assert "metadata 'licence': 'openrail++ (LICENSE, README.md)'" in capsys.readouterr().out


def test_a_folder_that_cannot_be_loaded_is_told(tmp_path, sd1):
    convert(open_model(sd1), tmp_path / "folder", tokenizer=tokenizer(tmp_path / "words"))
    assert inspect(tmp_path / "folder")["notes"] == []
    (tmp_path / "folder" / "unet" / "config.json").unlink()
    assert inspect(tmp_path / "folder")["notes"] == ["missing files: 'unet/config.json'"]
