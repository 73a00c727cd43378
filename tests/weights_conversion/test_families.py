"""One row a family: what a model is by its parts, and models in memory."""

import json
from dataclasses import replace

import numpy as np
import pytest
from corpus.models import FIELDS, KINDS, TEXT, UNET, VAE, tensors, weights
from safetensors.numpy import save_file

from weights_conversion import (
    FAMILIES,
)
from weights_conversion import KINDS as NETWORKS
from weights_conversion import (
    CheckpointMismatch,
    FolderModel,
    InMemory,
    Network,
    NonFiniteWeights,
    convert,
    family_of,
    open_model,
    rows,
    write_component,
)
from weights_conversion.models.families import UNKNOWN

UNPROMPTED = UNET | {"context_width": None}
PARTS = ("text_encoder", "image_encoder", "image_decoder", "diffusion_model")
SCHEDULE = {**FAMILIES["sd1"].schedule, "prediction": "epsilon"}
SAMPLING = dict(FAMILIES["sd1"].sampling)


def test_every_row_can_be_used():
    for name, family in FAMILIES.items():
        assert family.name == name
        assert family.use or family.pipeline
        assert {part.kind for part in family.parts} <= NETWORKS.keys()
        assert len({part.name for part in family.parts}) == len(family.parts)
        if family.pipeline:
            assert family.index
            assert "diffusion_model" in {part.name for part in family.parts}
        if family.signs:
            assert all(NETWORKS[part.kind].from_shapes for part in family.parts)


@pytest.mark.parametrize(
    "parts, fields, family",
    [
        (PARTS, UNET, "sd1"),
        (PARTS, UNET | {"context_width": 32}, "sd1"),
        (PARTS, UNET | {"in_channels": 9}, "sd1-inpaint"),
        (PARTS, UNET | {"in_channels": 8}, "instruct-pix2pix"),
        (PARTS, UNET | {"context_width": 1024}, "sd2"),
        (PARTS, UNET | {"context_width": 1024, "in_channels": 9}, "sd2-inpaint"),
        (PARTS[1:], UNPROMPTED, "latent-diffusion"),
        (PARTS[1:], UNPROMPTED | {"num_classes": 5}, "latent-diffusion"),
        (PARTS[3:], UNPROMPTED, "pixel-diffusion"),
        (PARTS[3:], UNET, "sd1"),  # a part of it
        (PARTS[::3], UNET, "sd1"),
        (PARTS[1:], UNET, "sd1"),
        (PARTS[1:3], None, "vae"),
        (PARTS[:1], None, "text-encoder"),
        (PARTS[:3], None, "sd1"),
        (("text_encoder", "image_tower"), None, "clip"),
        ((*PARTS, "image_tower"), UNET, "sd1"),  # an image adapter's encoder lies there too
        (PARTS, UNET | {"num_classes": 5}, "sd1"),  # the nearest
        ((), None, "unknown"),
    ],
)
def test_the_family_is_told_by_the_parts(parts, fields, family):
    assert family_of(lambda part: part.name in parts, lambda part: fields).name == family


def test_two_text_encoders_have_names_of_their_own():
    first = rows("text_encoder", TEXT, "conditioner.embedders.0")
    second = rows("text_encoder", TEXT | {"activation": "gelu"}, "conditioner.embedders.1")
    assert first[0].compvis.name.startswith("conditioner.embedders.0.transformer.text_model.")
    assert second[0].compvis.name.startswith("conditioner.embedders.1.model.")
    assert [row.diffusers for row in first] == [row.diffusers for row in second]


# ── models in memory ──────────────────────────────────────────────────────────────────────────


def network(name, fields=FIELDS["sd1"], **changes):
    own = fields[KINDS[name]] | changes
    return Network(name, own, weights(name, own))


def stable_diffusion(**settings):
    networks = {name: network(name) for name in PARTS}
    return InMemory(networks, schedule=SCHEDULE, sampling=SAMPLING, **settings)


def test_models_in_memory_become_a_folder_or_a_file(tmp_path):
    def write_words(folder):
        folder.mkdir()
        (folder / "vocab.json").write_text("{}")

    model = stable_diffusion(
        size=(128, 64), is_whole=True, tokenizers={"text_encoder": write_words}
    )
    assert convert(model, tmp_path / "folder").dropped == []
    assert convert(model, tmp_path / "model.safetensors").dropped == []
    for path in (tmp_path / "folder", tmp_path / "model.safetensors"):
        found = open_model(path)
        assert found.family is FAMILIES["sd1"]
        assert found.schedule == SCHEDULE and found.sampling == SAMPLING
        for name in PARTS:
            assert found.fields(name) == model.fields(name)
            expected = weights(name, model.fields(name))
            for way in (found, model):
                arrays = dict(way.arrays(name))
                assert arrays.keys() == expected.keys()
                for path, array in arrays.items():
                    np.testing.assert_array_equal(array, expected[path])
    folder = FolderModel(tmp_path / "folder")
    assert folder.sample_size == [64, 32]
    assert folder.folder.config("vae")["sample_size"] == 128
    assert folder.folder.index["_class_name"] == "StableDiffusionPipeline"
    assert folder.tokenizer("text_encoder") == tmp_path / "folder" / "tokenizer"


def test_parts_alone_have_no_index(tmp_path):
    vae = InMemory({name: network(name) for name in PARTS[1:3]})
    convert(vae, tmp_path / "vae")
    assert [path.name for path in (tmp_path / "vae").iterdir()] == ["vae"]
    found = FolderModel(tmp_path / "vae")
    assert found.family is FAMILIES["vae"] and not found.is_whole
    assert found.has("image_encoder") and not found.has("diffusion_model")
    assert found.fields("image_decoder") == VAE
    with pytest.raises(CheckpointMismatch, match="no diffusion_model, only 'image_encoder'"):
        found.rows("diffusion_model")
    convert(found, tmp_path / "copy", dtype="float16")
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["vae"]
    unet = InMemory({"diffusion_model": network("diffusion_model")}, schedule=SCHEDULE)
    with pytest.raises(CheckpointMismatch, match="Pass sampling="):
        convert(unet, tmp_path / "unet")
    unet = InMemory(
        {"diffusion_model": network("diffusion_model")}, schedule=SCHEDULE, sampling=SAMPLING
    )
    convert(unet, tmp_path / "unet")
    assert sorted(path.name for path in (tmp_path / "unet").iterdir()) == ["scheduler", "unet"]


def test_refusals_of_models_in_memory(tmp_path):
    with pytest.raises(CheckpointMismatch, match="needs image_decoder too"):
        convert(InMemory({"image_encoder": network("image_encoder")}), tmp_path / "half")
    with pytest.raises(CheckpointMismatch, match="'text_encoder_3'.*Add a row"):
        InMemory(
            {"text_encoder_3": network("text_encoder"), "text_encoder": network("text_encoder")}
        )
    networks = {name: network(name) for name in PARTS[1:]}
    lacking = InMemory(networks, schedule=SCHEDULE, sampling=SAMPLING, is_whole=True)
    with pytest.raises(CheckpointMismatch, match="has no text_encoder, only"):
        convert(lacking, tmp_path / "lacking")
    broken = network("image_encoder")
    broken.arrays["conv_in/bias"][0] = np.nan
    both = {"image_encoder": broken, "image_decoder": network("image_decoder")}
    with pytest.raises(NonFiniteWeights, match="conv_in.bias"):
        convert(InMemory(both), tmp_path / "broken")
    pixels = InMemory(
        {"diffusion_model": network("diffusion_model", context_width=None)},
        schedule=SCHEDULE,
        sampling=SAMPLING,
    )
    assert pixels.family is FAMILIES["pixel-diffusion"]
    with pytest.raises(CheckpointMismatch, match="no single files of a diffusion model of pixels"):
        convert(pixels, tmp_path / "pixels.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_further_files_are_part_of_the_folder(tmp_path):
    def fail(folder):
        (folder / "notes.txt").write_text("")
        raise KeyboardInterrupt

    networks = {name: network(name) for name in PARTS[1:3]}
    with pytest.raises(KeyboardInterrupt):
        convert(InMemory(networks, extras=fail), tmp_path / "vae")
    assert list(tmp_path.iterdir()) == []
    convert(InMemory(networks, extras=lambda folder: (folder / "a").touch()), tmp_path / "vae")
    assert sorted(path.name for path in (tmp_path / "vae").iterdir()) == ["a", "vae"]


# ── the table is the only place ───────────────────────────────────────────────────────────────


def test_a_row_may_say_what_a_single_file_assumes(tmp_path, monkeypatch):
    changed = replace(
        FAMILIES["sd1"],
        latent_scale=0.25,
        schedule={**FAMILIES["sd1"].schedule, "beta_end": 0.02},
        sampling={**SAMPLING, "sampler": "euler"},
        sample_size=(32, 32),
    )
    monkeypatch.setitem(FAMILIES, "sd1", changed)
    save_file(tensors("sd1"), tmp_path / "model.safetensors")
    model = open_model(tmp_path / "model.safetensors")
    assert model.family is changed
    assert model.fields("image_encoder")["latent_scale"] == 0.25
    assert model.schedule["beta_end"] == 0.02
    assert model.sampling["sampler"] == "euler"
    assert model.sample_size == 32


def test_a_folder_without_any_part_is_unknown(tmp_path):
    write_component(tmp_path, "safety_checker", {"architectures": ["Checker"]}, {})
    model = FolderModel(tmp_path)
    assert model.family is UNKNOWN
    with pytest.raises(CheckpointMismatch, match="no diffusion_model, only other things"):
        model.fields("diffusion_model")
    with pytest.raises(CheckpointMismatch, match="no part of a model"):
        convert(model, tmp_path / "copy")


def test_a_config_that_cannot_be_read_is_named(tmp_path):
    convert(stable_diffusion(is_whole=True), tmp_path / "folder")
    config = tmp_path / "folder" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"act_fn": "gelu"}))
    model = FolderModel(tmp_path / "folder")
    assert model.has("text_encoder")
    with pytest.raises(CheckpointMismatch, match="folder.unet: .*act_fn = 'gelu'"):
        model.fields("diffusion_model")
