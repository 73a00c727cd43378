"""Sources of weights: folders, the hub's names, random numbers."""

import json
import shutil

import keras
import numpy as np
import pytest
from keras import ops

from kdiffusion import StableDiffusion, images
from kdiffusion.text.tokenizer import SimpleTokenizer
from kdiffusion.weights import hub, presets, sources, variables
from kdiffusion.weights.find import open_source
from kdiffusion.weights.random_tiny import RandomSource
from kdiffusion.weights.save import save
from kdiffusion.weights.sources import CheckpointSource
from weights_conversion import FAMILIES

PARTS = ("text_encoder", "image_encoder", "image_decoder", "diffusion_model")


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "tiny"
    tiny.save(path)
    return path


def test_a_saved_folder_has_diffusers_layout(folder):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert {
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
    } <= names


def test_saving_does_not_overwrite(tiny, folder):
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="exists"):
        tiny.save(folder)
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_a_model_is_loaded_whole_or_not_at_all(change):
    model = RandomSource().model("image_decoder", "float32")
    arrays = variables.arrays_of(model)
    if change == "missing":
        arrays.pop("conv_in/kernel")
    elif change == "extra":
        arrays["conv_in/other"] = np.zeros(3)
    else:
        arrays["conv_in/kernel"] = arrays["conv_in/kernel"][:1]
    with pytest.raises(ValueError, match="conv_in"):
        variables.assign(model, arrays.items())


def test_random_weights_are_the_same_everywhere():
    """Pin them, so that an image of random-tiny means the same on every machine and version."""
    kernel = variables.arrays_of(RandomSource().model("diffusion_model", "float32"))[
        "conv_in/kernel"
    ]
    np.testing.assert_allclose(kernel[0, 0, 0, :3], PINNED, rtol=1e-6)


PINNED = [0.11580702, -0.27592111, -0.20240355]


def test_presets_are_data():
    for name, preset in presets.PRESETS.items():
        if name == "shapes":
            assert preset.repository is None and (preset.height, preset.width) == (64, 64)
        else:
            assert preset.repository.count("/") == 1
            assert (preset.height, preset.width) in ((512, 512), (768, 768))
        assert preset.licence and preset.source, name


@pytest.mark.parametrize("preset", ["stable-diffusion-9", "no/such/folder", "hf:/x", ""])
def test_an_unknown_preset_lists_the_known_ones(preset):
    with pytest.raises(ValueError, match="random-tiny, shapes, stable-diffusion-2"):
        open_source(preset)


@pytest.mark.parametrize(
    "preset, repository, revision, licence",
    [
        (
            "stable-diffusion-v1-5",
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
            None,
            "CreativeML Open RAIL-M",
        ),
        ("hf://someone/something", "someone/something", None, None),
        ("hf://someone/something@main", "someone/something", "main", None),
    ],
)
def test_hub_addresses(monkeypatch, folder, preset, repository, revision, licence):
    asked = []

    def fetch(repository, revision=None, licence=None):
        asked.append((repository, revision, licence))
        return hub.Snapshot(folder, None)

    monkeypatch.setattr(hub, "fetch", fetch)
    source = open_source(preset)
    assert asked == [(repository, revision, licence)]
    assert source.height == (512 if preset == "stable-diffusion-v1-5" else 64)
    # The folder's own name is that of a commit.
    assert source.name == (preset if licence else "something")


def test_a_variant_of_the_hub_is_loaded(monkeypatch, folder, tmp_path):
    path = shutil.copytree(folder, tmp_path / "variant")
    for file in path.rglob("*.safetensors"):
        file.rename(file.with_name(f"{file.stem}.fp16.safetensors"))
    monkeypatch.setattr(hub, "fetch", lambda *arguments: hub.Snapshot(path, "fp16"))
    found = variables.arrays_of(open_source("hf://a/b").model("image_decoder", "float32"))
    expected = variables.arrays_of(CheckpointSource(folder).model("image_decoder", "float32"))
    np.testing.assert_array_equal(found["conv_in/kernel"], expected["conv_in/kernel"])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    "shape, axes", [((600, 300), (1, 0)), ((40, 300, 3, 3), (2, 3, 1, 0)), ((7,), (0,))]
)
def test_large_arrays_are_copied_whole(shape, axes, dtype):
    array = np.random.default_rng(0).standard_normal(shape, np.float32).transpose(axes)
    target = np.full(array.shape, np.nan, dtype)
    variables._fill(target, array)
    np.testing.assert_array_equal(target, array.astype(dtype))


def test_steps_start_at_one_whatever_an_early_file_says(folder, tmp_path):
    path = tmp_path / "early"
    path.mkdir()
    for part in folder.iterdir():
        (path / part.name).symlink_to(part)
    (path / "scheduler").unlink()
    (path / "scheduler").mkdir()
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    config["steps_offset"] = 0
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    assert CheckpointSource(path).sampling()[1].steps_offset == 1


def test_tensors_take_over_aligned_memory():
    from kdiffusion.runtime import backend

    for dtype in ("float32", "float16", "bfloat16", "int32"):
        array = backend.aligned_array((3, 5), dtype)
        assert array.ctypes.data % 64 == 0
        array[...] = np.arange(15).reshape(3, 5)
        tensor = backend.from_numpy(array)
        assert ops.convert_to_numpy(ops.cast(tensor, "float32")).tolist() == (
            np.arange(15).reshape(3, 5).tolist()
        )


@pytest.mark.parametrize("extension", ["safetensors", "ckpt"])
@pytest.mark.parametrize("family", ["sd1", "sd1-inpaint", "sd2"])
def test_a_single_file_gives_every_model_its_weights(tmp_path, extension, family):
    from corpus import models
    from safetensors.numpy import save_file

    tensors = models.tensors(family) | models.training_leftovers()
    path = tmp_path / f"model.{extension}"
    if extension == "ckpt":
        path.write_bytes(models.pickled(tensors))
    else:
        save_file(tensors, path)
    source = open_source(path, prediction_type="v" if family == "sd2" else None)
    assert source.schedule().prediction == ("v" if family == "sd2" else "epsilon")
    assert source.sampling()[0] == "ddim"
    for kind in PARTS:
        fields = models.FIELDS[family][models.KINDS[kind]]
        expected = models.weights(kind, fields)
        found = variables.arrays_of(source.model(kind, "float32"))
        assert found.keys() == expected.keys()
        for name, value in found.items():
            np.testing.assert_array_equal(value, expected[name])


def test_a_single_file_that_does_not_tell_its_prediction_asks_for_it(tmp_path):
    from corpus import models
    from safetensors.numpy import save_file

    save_file(models.tensors("sd2"), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="prediction_type"):
        StableDiffusion.from_preset(tmp_path / "model.safetensors")
    model = StableDiffusion.from_preset(tmp_path / "model.safetensors", prediction_type="v")
    assert model.schedule.prediction == "v"
    assert model.img_height == 96 * 2


def test_a_tokenizer_that_a_file_lacks_is_the_usual_one(tmp_path, monkeypatch):
    from corpus import models
    from safetensors.numpy import save_file

    asked = []
    monkeypatch.setattr(
        sources.SimpleTokenizer, "default", classmethod(lambda cls, **given: asked.append(given))
    )
    for family in ("sd1", "sd2"):
        save_file(models.tensors(family), tmp_path / f"{family}.safetensors")
        open_source(tmp_path / f"{family}.safetensors", prediction_type="v").tokenizer()
    assert asked == [{"pad_id": None}, {"pad_id": 0}]


def test_sources_know_their_family(tiny, folder, tmp_path):
    def family(*names, source=RandomSource()):
        models = {name: source.model(name, "float32") for name in names}
        return sources.PartsSource(models, source.schedule(), (64, 64)).family.name

    assert RandomSource().family is CheckpointSource(folder).family is FAMILIES["sd1"]
    assert open_source("shapes").family is FAMILIES["sd1"]
    assert family(*PARTS) == "sd1"
    assert family("image_encoder", "image_decoder") == "vae"


def test_the_preview_of_a_family_is_the_usual_one():
    latents = np.random.default_rng(0).standard_normal((1, 3, 2, 4), np.float32)
    for name in ("sd1", "sd1-inpaint", "sd2", "sd2-inpaint", "instruct-pix2pix"):
        own = images.preview(latents, matrix=FAMILIES[name].preview)
        np.testing.assert_array_equal(own, images.preview(latents))


def test_a_preset_may_leave_its_size_to_its_folder(folder, monkeypatch):
    row = presets.Preset(None, None, 128, "none", "nobody", folder=str(folder))
    monkeypatch.setitem(presets.PRESETS, "mine", row)
    source = open_source("mine")
    assert (source.name, source.height, source.width) == ("mine", 64, 128)


def test_parts_of_a_folder_open_without_the_rest(folder, tmp_path):
    shutil.copytree(folder / "vae", tmp_path / "vae")
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    source = open_source(tmp_path)
    found = variables.arrays_of(source.model("image_decoder", "float32"))
    expected = variables.arrays_of(CheckpointSource(folder).model("image_decoder", "float32"))
    np.testing.assert_array_equal(found["conv_in/kernel"], expected["conv_in/kernel"])
    assert source.tokenizer().rows(["a"]).shape == (1, 77)
    with pytest.raises(ValueError, match="has no diffusion_model, only"):
        source.architecture("diffusion_model")
    with pytest.raises(ValueError, match="has no diffusion_model, only"):
        StableDiffusion.from_preset(tmp_path)
    with pytest.raises(ValueError, match="has no diffusion_model, only"):
        source.height


def test_networks_of_no_kind_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Received: Sequential"):
        save(tmp_path / "model", {"diffusion_model": keras.Sequential()})


def test_each_text_encoder_has_its_tokenizer():
    source = RandomSource()
    models = {"text_encoder": source.model("text_encoder", "float32")}
    first, second = SimpleTokenizer.byte_level(), SimpleTokenizer.byte_level(max_length=9)
    given = {"text_encoder": first, "text_encoder_2": second}
    parts = sources.PartsSource(models, source.schedule(), (64, 64), given)
    assert parts.tokenizer() is first and parts.tokenizer("text_encoder_2") is second
    alone = sources.PartsSource(models, source.schedule(), (64, 64), first)
    assert alone.tokenizer() is first
    with pytest.raises(ValueError, match="no tokenizer of text_encoder_2"):
        alone.tokenizer("text_encoder_2")
