"""Latents and text states that are computed once and kept on the disk."""

import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from keras import ops
from PIL import Image

from kdiffusion import ImageEncoder, SimpleTokenizer, TextEncoder
from kdiffusion.images.preprocessing import Preprocessing
from kdiffusion.training.data import cache
from kdiffusion.training.data.batches import Data, InMemory, random_view
from kdiffusion.training.data.cache import cached
from kdiffusion.training.data.folders import ImageFolder

SIZE = Preprocessing(16, 16, flip=True)
TOKENIZER = SimpleTokenizer.byte_level()
CAPTIONS = ["a rose", "a tulip", "a rose", "", "a fern"]


@pytest.fixture(autouse=True)
def plain_graphs(monkeypatch):
    """Plain graphs where there are any: compiling takes longer than all else here."""
    monkeypatch.setattr(cache.programs, "use_jit", lambda *_: False)


@pytest.fixture(scope="module")
def image_encoder():
    return ImageEncoder({"channels": (8, 8), "layers_per_level": 1, "num_groups": 4})


@pytest.fixture(scope="module")
def text_encoder():
    sizes = {"width": 8, "depth": 1, "num_heads": 1, "mlp_width": 8}
    return TextEncoder({"vocabulary_size": 514, "end_id": 513, **sizes})


@pytest.fixture
def folder(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (5, 20, 24, 3), dtype=np.uint8)
    folder = tmp_path / "data"
    folder.mkdir()
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{number}.png")
    rows = [{"file_name": f"{n}.png", "text": text, "label": n} for n, text in enumerate(CAPTIONS)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def files(path):
    return {file.relative_to(path): file.stat().st_mtime_ns for file in Path(path).rglob("*.*")}


def test_cached_batches_are_what_the_encoders_return(folder, tmp_path, image_encoder, text_encoder):
    data = Data(ImageFolder(folder), SIZE, TOKENIZER, seed=2)
    told = []
    kept = cached(
        data,
        tmp_path / "cache",
        image_encoder=image_encoder,
        text_encoder=text_encoder,
        batch_size=2,
        progress=lambda *step: told.append(step),
    )
    assert told == [(2, 4), (4, 4), (2, 5), (4, 5), (5, 5)]
    flips = [random_view(2, place)[2] < 0.5 for place in range(10)]
    assert True in flips and False in flips
    for step in range(2):
        plain, batch = data.batch(step, 5), kept.batch(step, 5)
        names = ["context", "index", "label", "logvar", "mean", "sample"]
        assert sorted(batch) == names
        for name in ("index", "label", "sample"):
            np.testing.assert_array_equal(batch[name], plain[name])
        moments = image_encoder(plain["images"])
        for name in ("mean", "logvar"):
            assert batch[name].dtype == np.float32
            expected = ops.convert_to_numpy(moments[name])
            np.testing.assert_allclose(batch[name], expected, atol=1e-5)
        context = ops.convert_to_numpy(text_encoder(plain["tokens"])["context"])
        np.testing.assert_allclose(batch["context"], context, atol=1e-5)
    empty = ops.convert_to_numpy(text_encoder(TOKENIZER.rows([""]))["context"])
    np.testing.assert_allclose(kept.empty_context, empty[0], atol=1e-5)


def test_either_alone(folder, tmp_path, image_encoder, text_encoder):
    data = Data(ImageFolder(folder), SIZE, TOKENIZER)
    latents = cached(data, tmp_path, image_encoder=image_encoder)
    assert sorted(latents.batch(0, 2)) == ["index", "label", "logvar", "mean", "sample", "tokens"]
    assert latents.empty_context is None
    views = Data(ImageFolder(folder), Preprocessing(16, 16, crop="random"), TOKENIZER)
    texts = cached(views, tmp_path, text_encoder=text_encoder)
    batch = texts.batch(0, 2)
    assert sorted(batch) == ["context", "images", "index", "label", "sample"]
    np.testing.assert_array_equal(batch["images"], views.batch(0, 2)["images"])


def test_files_are_used_again_and_only_what_changed_is_computed(folder, tmp_path, image_encoder):
    store = tmp_path / "cache"

    def keep(preprocessing=SIZE):
        data = Data(ImageFolder(folder), preprocessing)
        return cached(data, store, image_encoder=image_encoder, batch_size=5).batch(0, 5)

    first = keep()
    before = files(store)
    assert [name.suffix for name in before] == 5 * [".npy"]
    np.testing.assert_array_equal(keep()["mean"], first["mean"])
    assert files(store) == before

    Image.new("RGB", (20, 24), (1, 2, 3)).save(folder / "3.png")
    second = keep()
    changed = files(store)
    assert len(changed.keys() - before.keys()) == 1 and before.items() <= changed.items()
    same = second["sample"] != 3
    np.testing.assert_array_equal(second["mean"][same], first["mean"][same])
    assert not np.allclose(second["mean"][~same], first["mean"][~same])

    keep(Preprocessing(16, 16))
    pictures = len(list(store.rglob("*.npy")))
    assert pictures == 6 + 5
    bias = image_encoder.get_layer("conv_out").bias
    bias.assign(bias + 1.0)
    assert not np.allclose(keep()["mean"], second["mean"])
    bias.assign(bias - 1.0)
    assert len(list(store.rglob("*.npy"))) == pictures + 5


def test_files_that_were_cut_short_are_written_again(folder, tmp_path, image_encoder):
    data = Data(ImageFolder(folder), SIZE)
    first = cached(data, tmp_path / "cache", image_encoder=image_encoder).batch(0, 5)
    whole = sorted((tmp_path / "cache").rglob("*.npy"))
    whole[0].write_bytes(whole[0].read_bytes()[:-1])
    whole[1].write_bytes(b"")
    again = cached(data, tmp_path / "cache", image_encoder=image_encoder).batch(0, 5)
    np.testing.assert_allclose(again["mean"], first["mean"], atol=1e-6)
    assert sorted((tmp_path / "cache").rglob("*.*")) == whole


def test_broken_pictures_are_left_out(folder, tmp_path, image_encoder):
    (folder / "1.png").unlink()
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:100])
    data = Data(ImageFolder(folder), SIZE)
    with pytest.warns(UserWarning) as told:
        kept = cached(data, tmp_path / "cache", image_encoder=image_encoder)
    messages = sorted(str(warning.message) for warning in told)
    assert [text[:8] for text in messages if text.startswith("Sample")] == ["Sample 1", "Sample 2"]
    assert set(kept.batch(0, 10)["label"]) == {0, 3, 4}
    np.testing.assert_array_equal(kept.batch(0, 10)["label"], data.batch(0, 10)["label"])


def test_pictures_in_memory(tmp_path, image_encoder):
    pictures = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    for store in (pictures, pictures[::-1]):
        data = Data(InMemory(store), Preprocessing(16, 16), shuffle=False)
        mean = cached(data, tmp_path / "cache", image_encoder=image_encoder).batch(0, 3)["mean"]
        expected = ops.convert_to_numpy(image_encoder(data.batch(0, 3)["images"])["mean"])
        np.testing.assert_allclose(mean, expected, atol=1e-5)
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 3


def test_what_cannot_be_cached(tmp_path, image_encoder, text_encoder, monkeypatch):
    pictures = InMemory(np.zeros((1, 16, 16, 3)))
    views = Data(pictures, Preprocessing(16, 16, crop="random"))
    with pytest.raises(ValueError, match="crop='random' and no augmentation"):
        cached(views, tmp_path, image_encoder=image_encoder)
    with pytest.raises(ValueError, match="multiple of 2"):
        cached(Data(pictures, Preprocessing(16, 15)), tmp_path, image_encoder=image_encoder)
    with pytest.raises(ValueError, match="data with no tokenizer"):
        cached(Data(pictures, SIZE), tmp_path, text_encoder=text_encoder)
    with pytest.raises(ValueError, match="data with no captions"):
        cached(Data(pictures, SIZE, TOKENIZER), tmp_path, text_encoder=text_encoder)

    def broken(model, pictures):
        return {name: moment + np.nan for name, moment in model(pictures).items()}

    monkeypatch.setattr(cache, "encode_pixels", broken)
    with pytest.raises(ValueError, match="result is NaN or infinite"):
        cached(Data(pictures, SIZE), tmp_path / "nan", image_encoder=image_encoder)
    assert not list(tmp_path.rglob("*.*"))


def test_one_thread_at_a_time_parses_the_head_of_a_file(
    folder, tmp_path, image_encoder, monkeypatch
):
    parsing, together = set(), []

    def load(*args, **kwargs):
        parsing.add(threading.get_ident())
        time.sleep(0.002)
        together.append(len(parsing))
        parsing.discard(threading.get_ident())
        return genuine(*args, **kwargs)

    data = cached(
        Data(ImageFolder(folder), SIZE, seed=2, workers=4),
        tmp_path / "kept",
        image_encoder=image_encoder,
    )
    genuine = np.load
    monkeypatch.setattr(np, "load", load)
    data.batch(0, 16)
    assert together == [1] * 16
