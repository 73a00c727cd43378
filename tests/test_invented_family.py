"""A family that does not exist, added by one row, one pipeline class and one preset.

It has other widths than Stable Diffusion, a second text encoder with a tokenizer of its own, and a
network that is given a pooled vector and the size of the image too. The network is new, so it comes
with a class, a name table and a config, as any new network would. All of it stands in this file:
nothing in the packages knows of it.
"""

from dataclasses import dataclass

import keras
import numpy as np
import pytest
from keras import ops

from kdiffusion import Schedule, StableDiffusion, open_model
from kdiffusion.models.base import ArchitectureModel
from kdiffusion.models.image_decoder import ImageDecoder
from kdiffusion.models.image_encoder import ImageEncoder
from kdiffusion.models.layers.base import repeat_rows
from kdiffusion.models.text_encoder import TextEncoder
from kdiffusion.pipelines.base import Component
from kdiffusion.pipelines.open_model import PIPELINES
from kdiffusion.text.tokenizer import SimpleTokenizer
from kdiffusion.weights.presets import PRESETS, Preset
from kdiffusion.weights.variables import MODELS
from weights_conversion import FAMILIES, KINDS, Family, Kind, Part, convert, inspect
from weights_conversion import open_model as open_checkpoint
from weights_conversion.names.table import Place, layers

pytestmark = pytest.mark.backend

TEXT_WIDTH, SIZES = 64, 2

# ── the network: a class, a name table, a config ──────────────────────────────────────────────


@dataclass(frozen=True)
class InventedArchitecture:
    """The smallest network with all inputs."""

    in_channels: int = 4
    out_channels: int = 4
    width: int = 24
    context_width: int = 2 * TEXT_WIDTH
    pooled_width: int = TEXT_WIDTH

    inputs = ("context", "pooled", "sizes")
    conditioning_channels = 0
    num_classes = None

    @property
    def given(self):
        """Return the width of all inputs that are no map, side by side."""
        return self.context_width + self.pooled_width + SIZES + 1


@keras.saving.register_keras_serializable(package="tests")
class InventedNetwork(ArchitectureModel):
    """Two convolutions, and between them a vector of everything that is given."""

    architecture_class = InventedArchitecture

    @staticmethod
    def graph(architecture, options):
        inputs = {
            "latents": keras.Input((None, None, architecture.in_channels), name="latents"),
            "timestep": keras.Input((), name="timestep"),
            "context": keras.Input((None, architecture.context_width), name="context"),
            "pooled": keras.Input((architecture.pooled_width,), name="pooled"),
            "sizes": keras.Input((SIZES,), name="sizes"),
        }

        def convolution(channels, name):
            return keras.layers.Conv2D(channels, 3, padding="same", name=name, **options)

        given = [
            ops.expand_dims(inputs["timestep"], -1) / 1000.0,
            ops.mean(inputs["context"], axis=1),
            inputs["pooled"],
            inputs["sizes"] / 100.0,
        ]
        vector = keras.layers.Dense(architecture.width, name="condition", **options)(
            ops.concatenate(given, axis=-1)
        )
        x = convolution(architecture.width, "conv_in")(inputs["latents"])
        x = ops.silu(x + vector[:, None, None, :])
        return inputs, convolution(architecture.out_channels, "conv_out")(x)

    def call(self, inputs, training=None, mask=None):
        # With guidance there are two rows of conditions for each row of latents.
        once = {
            name: repeat_rows(inputs[name], inputs["sizes"]) for name in ("latents", "timestep")
        }
        return super().call({**inputs, **once}, training=training, mask=mask)


LAYERS = (
    ("conv_in", "entry", "conv_in", "conv3 inputs width"),
    ("condition", "given", "condition", "dense given width"),
    ("conv_out", "exit", "conv_out", "conv3 width outputs"),
)


def network_rows(fields, prefix):
    sizes = {"inputs": fields["in_channels"], "outputs": fields["out_channels"]}
    given = InventedArchitecture(**fields).given
    return layers(Place(compvis=prefix), LAYERS, width=fields["width"], given=given, **sizes)


def network_from_shapes(shapes, prefix):
    width, inputs, _, _ = shapes.of(f"{prefix}.entry.weight", 4)
    outputs = shapes.of(f"{prefix}.exit.weight", 4)[0]
    fields = {"in_channels": inputs, "out_channels": outputs, "width": width}
    return fields | {"context_width": 2 * TEXT_WIDTH, "pooled_width": TEXT_WIDTH}


NETWORK = Kind(
    rows=network_rows,
    fields=lambda config: {name: config[name] for name in InventedArchitecture.__annotations__},
    config=lambda fields, sample_size, pixels: {
        "_class_name": "InventedNetwork",
        "sample_size": sample_size,
        **fields,
    },
    from_shapes=network_from_shapes,
)

# ── the family: one row, one pipeline class, one preset ───────────────────────────────────────

PREFIX = "invented.network"
FAMILY = Family(
    "invented",
    "An invention",
    signs=lambda shapes: f"{PREFIX}.given.weight" in shapes,
    parts=(
        Part("text_encoder", "text_encoder", "text_encoder", "texts.0", "tokenizer"),
        Part("text_encoder_2", "text_encoder", "text_encoder_2", "texts.1", "tokenizer_2"),
        Part("image_encoder", "image_encoder", "vae", "images"),
        Part("image_decoder", "image_decoder", "vae", "images"),
        Part("diffusion_model", "invented_network", "unet", PREFIX),
    ),
    pipeline="InventedDiffusion",
    index="InventedPipeline",
    preview=((0.5, 0.0, 0.0), (0.0, 0.5, 0.0), (0.0, 0.0, 0.5), (0.1, 0.1, 0.1)),
    prediction="v",
    latent_scale=0.3,
)


class InventedDiffusion(StableDiffusion):
    """Stable Diffusion but for the inputs of its network."""

    text_encoder_2 = Component("text_encoder_2", "Tokens to states and a vector.")

    def conditions(self, texts, size):
        rows = self.source.tokenizer("text_encoder_2").rows(texts)
        second = {name: np.array(value) for name, value in self.text_encoder_2(rows).items()}
        context = np.concatenate([self.encode_text(texts), second["context"]], axis=-1)
        sizes = np.tile(np.float32(size), (len(texts), 1))
        return {"context": context, "pooled": second["pooled"], "sizes": sizes}

    @classmethod
    def _check_architecture(cls, architecture):
        if "pooled" not in architecture.inputs:
            raise ValueError("InventedDiffusion gives its network a pooled vector.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Add the rows to the tables, and return the folder of the preset."""
    path = tmp_path_factory.mktemp("invented") / "saved"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(KINDS, "invented_network", NETWORK)
        patch.setitem(MODELS, "invented_network", InventedNetwork)
        patch.setitem(FAMILIES, "invented", FAMILY)
        patch.setitem(PIPELINES, "InventedDiffusion", InventedDiffusion)
        patch.setitem(PRESETS, "invented", Preset(None, None, None, "none", "nobody", str(path)))
        yield path


@pytest.fixture(scope="module")
def model(folder):
    """Make an invented model of random weights, which lies in the preset's folder too."""
    keras.utils.set_random_seed(0)
    text = {"vocabulary_size": 514, "max_length": 77, "width": TEXT_WIDTH, "depth": 1}
    text |= {"num_heads": 1, "mlp_width": 128, "end_id": 513}
    codec = {"channels": (32, 32), "layers_per_level": 1, "latent_scale": FAMILY.latent_scale}
    models = {
        "text_encoder": TextEncoder(text),
        "text_encoder_2": TextEncoder(text | {"activation": "gelu"}),
        "image_encoder": ImageEncoder(codec),
        "image_decoder": ImageDecoder(codec),
        "diffusion_model": InventedNetwork(),
    }
    tokenizers = {
        "text_encoder": SimpleTokenizer.byte_level(),
        "text_encoder_2": SimpleTokenizer.byte_level(max_length=77),
    }
    tokenizers["text_encoder_2"].pad_id = 0
    model = InventedDiffusion.from_parts(
        models, Schedule(prediction="v"), (16, 24), tokenizer=tokenizers
    )
    model.save(folder)
    return model


def generate(model, prompt="a red circle", **settings):
    settings = {"num_steps": 2, "seed": 42, "verbose": 0} | settings
    return model.text_to_image(prompt, **settings)


def test_an_invented_family_generates_and_is_loaded(model, folder):
    image = generate(model)
    assert image.shape == (1, 16, 24, 3)
    for changed in ("a blue cross", {"seed": 1}, {"height": 24}, {"negative_prompt": "red"}):
        settings = {"prompt": changed} if isinstance(changed, str) else changed
        other = generate(model, **settings)
        assert other.shape != image.shape or (other != image).any()
    pair = generate(model, ["a red circle", "a blue cross"])
    np.testing.assert_allclose(pair[:1].astype(int), image.astype(int), atol=1)
    loaded = open_model("invented")
    assert type(loaded) is InventedDiffusion
    assert loaded.source.family is FAMILY
    assert (loaded.img_height, loaded.img_width) == (16, 24)
    assert loaded.source.tokenizer("text_encoder_2").pad_id == 0
    np.testing.assert_array_equal(generate(loaded), image)
    np.testing.assert_array_equal(generate(open_model(folder)), image)
    with pytest.raises(ValueError, match="InventedDiffusion gives its network"):
        InventedDiffusion.from_preset("random-tiny")


def test_an_invented_family_is_converted(model, folder, tmp_path):
    report = convert(open_checkpoint(folder), tmp_path / "model.safetensors")
    assert report.dropped == ["scheduler/", "tokenizer/", "tokenizer_2/"]
    file = open_checkpoint(tmp_path / "model.safetensors")
    assert file.family is FAMILY
    assert inspect(tmp_path / "model.safetensors")["family"] == "An invention"
    tokenizers = {"text_encoder": model.tokenizer}
    tokenizers["text_encoder_2"] = model.source.tokenizer("text_encoder_2")
    asked = []

    def write_tokenizer(place, source, name):
        asked.append((name, source.pad_id(name)))
        tokenizers[name].save(place)
        return True

    report = convert(file, tmp_path / "folder", tokenizer=write_tokenizer)
    assert report.dropped == []
    assert asked == [("text_encoder", None), ("text_encoder_2", 0)]
    first, second = content(folder), content(tmp_path / "folder")
    assert first.keys() == second.keys()
    differing = {name for name in first if first[name] != second[name]}
    assert {name.split("/")[-1] for name in differing} <= {"config.json", "scheduler_config.json"}
    np.testing.assert_array_equal(
        generate(open_model(tmp_path / "folder", 16, 24)), generate(open_model(folder))
    )


def test_without_its_rows_an_invented_model_is_a_stranger(model, folder, monkeypatch, tmp_path):
    convert(open_checkpoint(folder), tmp_path / "model.safetensors")
    monkeypatch.delitem(FAMILIES, "invented")
    with pytest.raises(ValueError, match="unet: .*_class_name = 'InventedNetwork'"):
        open_model(folder)
    with pytest.raises(ValueError, match="looks like nothing that is known here"):
        open_model(tmp_path / "model.safetensors")


def content(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
