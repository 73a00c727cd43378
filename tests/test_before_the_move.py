"""Files and names from before the modules moved: users keep both.

`golden/make_before_the_move.py` wrote the files, at the commit before the move.
"""

import functools
import importlib
import inspect
import sys
from pathlib import Path

import numpy as np
import pytest
from golden import make_before_the_move as golden
from keras import ops

from kdiffusion import images
from kdiffusion.training import CLIPTrainer

pytestmark = pytest.mark.backend

KDIFFUSION = """DiffusionModel Guidance ImageDecoder ImageEncoder ImageTower LatentDiffusion
    PixelDiffusion Sampler Schedule SimpleTokenizer Spacing StableDiffusion TextEncoder""".split()
TRAINING = """Augmentation AutoencoderObjective AutoencoderTrainer CLIPTrainer Data
    DiffusionTrainer Discriminator ImageFolder InMemory Loop LoopSettings Objective Perceptual
    Prefetch Preprocessing Stream Trainer cached""".split()
WEIGHTS_CONVERSION = """Checkpoint CheckpointError CheckpointLimit CheckpointMismatch
    CorruptCheckpoint DiffusersFolder FolderModel Limits NonFiniteWeights Report Row SingleFile
    Stored TensorInfo UnsafeCheckpoint autoencoder_config autoencoder_fields clip_config clip_fields
    convert diffusion_model_config diffusion_model_fields image_tower_config image_tower_fields
    inspect open_checkpoint open_model open_safetensors open_single_file open_torch
    preprocessor_config read rows scheduler_config scheduler_fields staged staged_file
    text_encoder_config text_encoder_fields translate write write_component write_index
    write_scheduler""".split()
PUBLIC = {
    "kdiffusion": ["__version__", *KDIFFUSION],
    "kdiffusion.training": TRAINING,
    "weights_conversion": WEIGHTS_CONVERSION,
}
IMAGES = "pad_for_outpainting slerp to_model to_mask preview to_uint8".split()


def arrays(name):
    with np.load(golden.FOLDER / f"{name}.npz") as file:
        return dict(file)


def files(folder):
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*") if path.is_file()}


@functools.cache
def loaded(name):
    """A network that nobody changes."""
    return golden.load(name)


def weights(model):
    return {variable.path: ops.convert_to_numpy(variable.value) for variable in model.variables}


@pytest.fixture
def without_reports(monkeypatch):
    """They take longer than training these."""
    for name in ("matplotlib", "tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names_are_there(package):
    module = importlib.import_module(package)
    assert [name for name in PUBLIC[package] if not hasattr(module, name)] == []
    assert set(PUBLIC[package]) <= set(module.__all__)


def test_pictures_have_their_functions():
    assert [name for name in IMAGES if not inspect.isfunction(getattr(images, name, None))] == []


@pytest.mark.parametrize("name", golden.MODELS)
def test_keras_files_are_loaded_and_compute_the_same(name, tmp_path):
    model = loaded(name)
    model_class, architecture = golden.MODELS[name]
    assert type(model) is model_class and model.name == name
    stored = arrays("outputs")
    groups = {group: dict(_part(stored, f"{name}|{group}|")) for group in ("input", "output")}
    outputs = golden.compute(model, groups["input"])
    assert outputs.keys() == groups["output"].keys()
    for key, output in outputs.items():
        np.testing.assert_allclose(output, groups["output"][key], rtol=1e-5, atol=1e-5)
    if name not in golden.WEIGHTS:
        return
    new = model_class(architecture, name="another")
    new.load_weights(golden.unpack("weights", tmp_path) / f"{name}.weights.h5")
    _assert_equal(weights(new), weights(model))


@pytest.mark.parametrize("name", golden.RUNS)
def test_a_run_in_progress_is_taken_up_and_ends_the_same(name, tmp_path, without_reports):
    loop = golden.RUNS[name](golden.unpack("runs", tmp_path) / name)
    loop.run(golden.STOP)
    expected = arrays("trained")
    np.testing.assert_array_equal(golden.trained(loop), expected[f"{name} {golden.STOP}"])
    assert loop.step == golden.STOP
    if name in golden.FINISHED:
        loop.run(golden.STEPS)
        whole = expected[f"{name} {golden.STEPS}"]
        np.testing.assert_allclose(golden.trained(loop), whole, rtol=1e-4, atol=1e-5)


def test_the_cache_is_recognised(tmp_path):
    folder = golden.unpack("cache", tmp_path)
    before = files(folder)
    batch = golden.fill_cache(folder)
    assert files(folder) == before
    _assert_equal(batch, arrays("cached"))


@pytest.mark.parametrize("name", golden.WHOLE)
def test_folders_are_loaded(name, tmp_path):
    model_class, networks = golden.WHOLE[name]
    model = model_class.from_preset(golden.unpack("folders", tmp_path) / name, jit_compile=False)
    assert model.schedule == golden.SCHEDULE
    for network in networks:
        kind = network.partition("_of_")[0]
        own = getattr(model, "decoder" if kind == "image_decoder" else kind)
        expected = loaded(network)
        assert own.architecture == expected.architecture
        _assert_equal(weights(own), weights(expected))
    if "text_encoder" in networks:
        rows = model.tokenizer.rows(golden.CAPTIONS)
        np.testing.assert_array_equal(rows, golden.tokenizer().rows(golden.CAPTIONS))


def test_a_clip_is_loaded_and_encodes_the_same(tmp_path):
    trainer = CLIPTrainer.from_folder(golden.unpack("folders", tmp_path) / "clip")
    vectors = trainer.encode_text(golden.tokenizer().rows(golden.CAPTIONS))
    np.testing.assert_allclose(vectors, arrays("clip")["vectors"], atol=1e-5)


def _part(stored, prefix):
    for name, array in stored.items():
        if name.startswith(prefix):
            yield name.removeprefix(prefix), array


def _assert_equal(received, expected):
    assert received.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(received[name], array, err_msg=name)
