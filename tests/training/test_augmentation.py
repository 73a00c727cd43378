"""Augmentation by keras-cv's layers: what happens to a picture follows from a number."""

import keras
import keras_cv
import numpy as np
import pytest
from keras_cv import layers

from kdiffusion.images.preprocessing import Preprocessing
from kdiffusion.training.data.augmentation import Augmentation
from kdiffusion.training.data.batches import Data, InMemory

PICTURE = np.random.default_rng(0).uniform(0, 1, (16, 16, 3)).astype(np.float32)
RANGE = {"value_range": (0, 255)}


def views(augmentation, seeds=range(6)):
    return np.stack([augmentation(PICTURE, seed) for seed in seeds])


@pytest.mark.parametrize(
    "make",
    [
        lambda: layers.RandomFlip(),
        lambda: layers.RandomFlip(seed=3),
        lambda: layers.RandomBrightness(0.2),
        lambda: layers.RandomColorJitter(
            **RANGE,
            brightness_factor=0.2,
            contrast_factor=0.2,
            saturation_factor=0.2,
            hue_factor=0.1,
        ),
        lambda: layers.RandomCropAndResize(
            target_size=(16, 16), crop_area_factor=(0.5, 1.0), aspect_ratio_factor=(0.9, 1.1)
        ),
        lambda: layers.RandomRotation(0.1),
        lambda: layers.RandAugment(**RANGE),
        lambda: layers.RandomApply(layers.RandomHue(factor=0.5, **RANGE), rate=0.5),
        lambda: layers.RandomChoice([layers.RandomFlip(), layers.RandomSharpness(0.5, **RANGE)]),
        lambda: layers.RandomSaturation(
            keras_cv.core.NormalFactorSampler(0.5, 0.2, min_value=0.0, max_value=1.0)
        ),
        lambda: keras.layers.RandomFlip("horizontal"),
    ],
)
def test_layers_draw_from_the_number_alone(make):
    one, other = Augmentation([make()], 16, 16), Augmentation([make()], 16, 16)
    first = views(one)
    assert first.dtype == np.float32 and first.shape == (6, 16, 16, 3)
    assert 0.0 <= first.min() and first.max() <= 1.0
    assert len(np.unique(first, axis=0)) > 1
    np.testing.assert_array_equal(first[::-1], views(other, range(5, -1, -1)))
    np.testing.assert_array_equal(first[3], one(PICTURE, 3))


def test_layers_run_one_after_the_other():
    chain = [layers.RandomFlip(rate=1.0), layers.Solarization(**RANGE)]
    np.testing.assert_allclose(
        Augmentation(chain, 16, 16)(PICTURE, 0), 1.0 - PICTURE[:, ::-1], atol=1e-6
    )
    twins = Augmentation([layers.RandomFlip(), layers.RandomFlip()], 16, 16)
    straight = [np.allclose(view, PICTURE) for view in views(twins, range(16))]
    assert 0 < sum(straight) < 16  # both draw anew: equal coins would undo each other


class Unset(keras.layers.Layer):
    """A layer with random numbers that nobody can set."""

    def call(self, inputs):
        return inputs + np.random.default_rng().uniform()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: layers.RandomCutout(0.3, 0.3, fill_mode="gaussian_noise"), "cannot be set"),
        (lambda: layers.AugMix(**RANGE), "AugMix draws random numbers that cannot be set"),
        (Unset, "Unset draws random numbers that cannot be set"),
        (lambda: layers.RandomAspectRatio(factor=(0.5, 0.6)), "cannot change a single image"),
        (lambda: layers.RandomCrop(8, 8), r"the same size.*Received: shape \(8, 8, 3\)"),
        (lambda: layers.RandomJpegQuality(factor=(20, 80)), "values from 0 to 255"),
        (lambda: layers.MixUp(), "MixUp cannot change a single image"),
        (lambda: layers.RandomBrightness(0.2, dtype="bfloat16"), "too coarse for images"),
        (lambda: "RandomFlip", "made of layers. Received: 'RandomFlip'"),
    ],
)
def test_layers_that_cannot_serve(make, message):
    with pytest.raises(ValueError, match=message):
        Augmentation([make()], 16, 16)


def test_data_augments_each_sample_by_its_place():
    source = InMemory(PICTURE[None])
    settings = {"augmentation": [layers.RandomBrightness(0.3)], "seed": 5}
    data = Data(source, Preprocessing(16, 16), **settings)
    batch = data.batch(0, 6)["images"]
    assert len(np.unique(batch, axis=0)) == 6
    resumed = Data(source, Preprocessing(16, 16), **settings)
    np.testing.assert_array_equal(resumed.batch(2, 2)["images"], batch[4:])
