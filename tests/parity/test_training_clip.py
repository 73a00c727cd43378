"""CLIP against transformers on random weights: towers, loss, gradients, and the files of both."""

import json

import keras
import numpy as np
import pytest
import torch
from keras import ops
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
)

from kdiffusion.training.trainers.clip import CLIPTrainer
from kdiffusion.weights import clip_folder
from weights_conversion import rows, write
from weights_conversion.configs import clip_fields

pytestmark = pytest.mark.backend

PIXELS = 32
TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 9,
    "bos_token_id": 38,
    "eos_token_id": 39,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": PIXELS,
    "patch_size": 8,
}
PREPROCESSOR = {"image_mean": [0.4, 0.5, 0.3], "image_std": [0.2, 0.3, 0.25]}


def randomized(activation="quick_gelu", logit_scale=2.6592):
    """Their model with random values in every parameter, norms and biases too."""
    towers = {
        "text_config": TEXT | {"hidden_act": activation},
        "vision_config": VISION | {"hidden_act": activation},
    }
    model = CLIPModel(CLIPConfig(projection_dim=10, **towers)).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        deviation = 0.3 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
        parameter.data.normal_(1.0 if "norm.weight" in name else 0.0, deviation)
    model.logit_scale.data.fill_(logit_scale)
    return model


def saved(model, path):
    model.save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return path


def batch_of(size):
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 38, (size, 9)).astype("int32")
    tokens[:, 0], tokens[:, -1] = 38, 39
    tokens[1, 5:] = 39  # the first end token counts
    images = generator.uniform(-1, 1, (size, PIXELS, PIXELS, 3)).astype("float32")
    return {"images": images, "tokens": tokens}


def pixels_of(images):
    mean, std = (np.array(PREPROCESSOR[name], "float32") for name in ("image_mean", "image_std"))
    return torch.tensor((((images + 1) / 2 - mean) / std).transpose(0, 3, 1, 2))


def their_outputs(model, batch):
    tokens = torch.tensor(batch["tokens"].astype("int64"))
    return model(input_ids=tokens, pixel_values=pixels_of(batch["images"]), return_loss=True)


@pytest.fixture
def check(record_property, request):
    """Records a figure for `acceptance/training_losses.py` and compares it with its bar."""

    def compare(name, error, bar):
        record_property(f"{request.node.name}: {name}", f"{error:.1e} < {bar:.0e}")
        assert error < bar

    return compare


def relative_error(found, expected):
    expected = expected.detach().numpy()
    return np.abs(ops.convert_to_numpy(found) - expected).max() / np.abs(expected).max()


# ── the towers ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_towers(tmp_path, check, activation):
    theirs, batch = randomized(activation), batch_of(3)
    text_encoder, image_tower, _, _ = clip_folder.load(saved(theirs, tmp_path / "clip"))
    with torch.no_grad():
        expected = their_outputs(theirs, batch)
    texts, images = text_encoder(batch["tokens"]), image_tower(batch["images"])
    for name, found, reference in (
        ("context", texts["context"], expected.text_model_output.last_hidden_state),
        ("text vectors", texts["pooled"], expected.text_model_output.pooler_output),
        ("states", images["states"], expected.vision_model_output.last_hidden_state),
        ("image vectors", images["pooled"], expected.vision_model_output.pooler_output),
    ):
        check(name, relative_error(found, reference), 2e-6)


# ── the loss and its gradients ────────────────────────────────────────────────────────────────


def our_gradients(trainer, batch):
    """By a step of plain gradient descent, large enough that the weights before it are nothing."""
    rate = 2.0**20
    trainer.logit_scale.constraint = None
    before = [ops.convert_to_numpy(variable.value) for variable in trainer.trainable_variables]
    trainer.compile(keras.optimizers.SGD(rate))
    history = trainer.fit(batch, batch_size=len(batch["tokens"]), verbose=0).history
    gradients = [
        (value - ops.convert_to_numpy(variable.value)) / rate
        for variable, value in zip(trainer.trainable_variables, before)
    ]
    return history["loss"][0], dict(zip(map(id, trainer.trainable_variables), gradients))


def in_their_names(trainer, gradients):
    """Gradients as transformers names and lays them out."""
    kinds = {"text_encoder": trainer.text_encoder, "image_tower": trainer.image_tower}
    fields = dict(zip(kinds, (trainer.configuration[kind] for kind in kinds)))
    tensors = {"logit_scale": gradients[id(trainer.logit_scale)]}
    for kind, model in kinds.items():
        values = {variable.path: gradients[id(variable)] for variable in model.variables}
        tensors |= write(rows(kind, fields[kind]), values, "diffusers")
    return tensors


def worst_error(theirs, tensors):
    """The largest difference of any gradient, relative to the largest number of its tensor.

    PyTorch's own are up to 1e-5 from what it computes in float64.
    """
    gradients = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    assert gradients.keys() == tensors.keys()
    largest = max(np.abs(gradient).max() for gradient in gradients.values())
    errors = []
    for name, gradient in gradients.items():
        error = np.abs(tensors[name] - gradient).max()
        if name.endswith("k_proj.bias"):
            # It adds the same to all logits of a softmax: the gradient is 0 but for rounding.
            assert error < 1e-6 * largest
        else:
            errors.append(error / np.abs(gradient).max())
    return max(errors)


@pytest.mark.parametrize("logit_scale", [2.6592, 4.6])
def test_loss_and_gradients(tmp_path, check, logit_scale):
    theirs, batch = randomized(logit_scale=logit_scale), batch_of(6)
    trainer = CLIPTrainer.from_folder(saved(theirs, tmp_path / "clip"))
    assert float(trainer.logit_scale.value) == pytest.approx(logit_scale, abs=1e-6)
    expected = their_outputs(theirs, batch).loss
    expected.backward()
    loss, gradients = our_gradients(trainer, batch)
    check("loss", abs(loss / expected.item() - 1), 1e-6)
    check("gradients", worst_error(theirs, in_their_names(trainer, gradients)), 5e-5)


def test_loss_and_gradients_with_equal_captions(tmp_path, check):
    """PyTorch's cross entropy with targets that are shared by equal captions."""
    theirs, batch = randomized(), batch_of(6)
    batch["tokens"][[3, 5]] = batch["tokens"][0]
    trainer = CLIPTrainer.from_folder(saved(theirs, tmp_path / "clip"))
    tokens = torch.tensor(batch["tokens"])
    targets = (tokens[:, None] == tokens[None]).all(-1).float()
    targets = targets / targets.sum(1, keepdim=True)
    logits = their_outputs(theirs, batch).logits_per_image
    cross_entropy = torch.nn.functional.cross_entropy
    expected = (cross_entropy(logits, targets) + cross_entropy(logits.T, targets)) / 2
    expected.backward()
    loss, gradients = our_gradients(trainer, batch)
    check("loss", abs(loss / expected.item() - 1), 1e-6)
    check("gradients", worst_error(theirs, in_their_names(trainer, gradients)), 5e-5)


# ── files ─────────────────────────────────────────────────────────────────────────────────────


def loaded(cls, path):
    model, report = cls.from_pretrained(path, output_loading_info=True, dtype="auto")
    assert not any(report.values()), report
    return model.state_dict()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_saved_is_what_transformers_loads(tmp_path, dtype):
    theirs = randomized()
    trainer = CLIPTrainer.from_folder(saved(theirs, tmp_path / "theirs"))
    path = tmp_path / "ours"
    trainer.save(path, dtype=dtype)
    tensors = loaded(CLIPModel, path)
    assert tensors.keys() == theirs.state_dict().keys()
    parts = loaded(CLIPTextModelWithProjection, path / "text_encoder")
    parts |= loaded(CLIPVisionModelWithProjection, path / "image_encoder")
    assert parts.keys() | {"logit_scale"} == tensors.keys()
    kind = getattr(torch, dtype)
    for name, tensor in theirs.state_dict().items():
        expected = tensor.to(kind)
        for found in filter(lambda found: name in found, (tensors, parts)):
            torch.testing.assert_close(found[name].to(kind), expected, rtol=0, atol=0)


def test_the_saved_configs_mean_the_same(tmp_path):
    theirs = randomized("gelu")
    trainer = CLIPTrainer.from_folder(saved(theirs, tmp_path / "theirs"))
    trainer.save(tmp_path / "ours")
    again, batch = CLIPModel.from_pretrained(tmp_path / "ours").eval(), batch_of(4)
    with torch.no_grad():
        found, expected = their_outputs(again, batch), their_outputs(theirs, batch)
    torch.testing.assert_close(found.logits_per_image, expected.logits_per_image, rtol=0, atol=0)
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    ours = json.loads((tmp_path / "ours" / "config.json").read_text())
    preprocessor = json.loads((tmp_path / "ours" / "preprocessor_config.json").read_text())
    assert clip_fields(ours, preprocessor) == clip_fields(config, PREPROCESSOR)


def test_their_preprocessor_makes_the_same_pixels(tmp_path):
    trainer = CLIPTrainer.from_folder(saved(randomized(), tmp_path / "theirs"))
    trainer.save(tmp_path / "ours")
    processor = CLIPImageProcessorPil.from_pretrained(tmp_path / "ours")
    picture = np.random.default_rng(0).integers(0, 256, (PIXELS, PIXELS, 3), np.uint8)
    found = processor(picture, return_tensors="pt").pixel_values
    expected = pixels_of(picture[None].astype("float32") / 127.5 - 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
