"""All families of models: files, names, dtypes, sizes and gradients."""

import keras
import numpy as np
import pytest
from families import FAMILIES, model_of
from keras import ops

from kdiffusion.pipelines.open_model import open_model
from kdiffusion.records import fields
from kdiffusion.weights.variables import arrays_of
from weights_conversion import Checkpoint, TensorInfo, read, rows, write
from weights_conversion.names.table import DIALECTS

PARTS = [(name, kind) for name, family in FAMILIES.items() for kind in family.parts]
# Softmax does not see what is added to all logits of a query.
UNSEEN = "attention/key/bias"


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Return the folder that a family's model is saved in, as a function of its name."""
    folders = {}

    def find(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("saved") / "model"
            model_of(name).save(folders[name])
        return folders[name]

    return find


def part_of(model, kind):
    return getattr(model, {"image_decoder": "decoder"}.get(kind, kind))


def test_a_saved_model_is_the_same_model(name, folder_of):
    family, model = FAMILIES[name], model_of(name)
    loaded = open_model(folder_of(name), jit_compile=False)
    assert type(loaded) is family.pipeline
    assert (loaded.img_height, loaded.img_width) == family.size
    assert loaded.schedule == family.schedule
    images = family.generate(model)
    assert images.shape == (1, *family.size, 3) and images.std() > 1
    np.testing.assert_array_equal(family.generate(loaded), images)
    with pytest.raises(ValueError, match="exists"):
        model.save(folder_of(name))


def test_any_size_can_be_generated(name):
    images = FAMILIES[name].generate(model_of(name), height=8, width=20, batch_size=2)
    assert images.shape == (2, 8, 20, 3)
    assert not np.array_equal(*images)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loaded_weights_are_the_saved_ones_rounded(name, dtype, folder_of):
    loaded = FAMILIES[name].pipeline.from_preset(folder_of(name), dtype=dtype)
    for kind in FAMILIES[name].parts:
        saved, found = (arrays_of(part_of(x, kind)) for x in (model_of(name), loaded))
        assert saved.keys() == found.keys()
        for path, value in found.items():
            assert value.dtype == dtype
            np.testing.assert_array_equal(value, saved[path].astype(value.dtype))


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name, kind", PARTS)
def test_every_weight_has_a_name_in_every_dialect(name, kind, dialect):
    model = part_of(model_of(name), kind)
    weights = arrays_of(model)
    table = rows(kind, fields(model.architecture))
    assert {row.kdiffusion: row.shape for row in table} == {k: x.shape for k, x in weights.items()}
    tensors = write(table, weights, dialect)
    infos = {key: TensorInfo(array.shape, array.dtype) for key, array in tensors.items()}
    found = dict(read(table, Checkpoint("memory", infos, tensors.get), dialect))
    assert found.keys() == weights.keys()
    for path, array in found.items():
        np.testing.assert_array_equal(array, weights[path])


@pytest.mark.parametrize("name, kind", PARTS)
def test_the_gradient_reaches_every_weight(name, kind):
    model = part_of(model_of(name), kind)
    generator = np.random.default_rng(0)

    def example(tensor):
        shape = [size or 8 for size in tensor.shape[1:]]
        if "int" in tensor.dtype:
            return generator.integers(0, 4, (2, *shape)).astype(tensor.dtype)
        return generator.normal(size=(2, *shape)).astype(tensor.dtype)

    inputs = keras.tree.map_structure(example, model.input)
    largest = {
        variable.path: 0.0 if gradient is None else np.abs(ops.convert_to_numpy(gradient)).max()
        for variable, gradient in zip(model.trainable_variables, gradients(model, inputs))
    }
    bar = 1e-5 * np.median([*largest.values()])
    unreached = [path for path, value in largest.items() if not value > bar]
    assert [path for path in unreached if not path.endswith(UNSEEN)] == []


def gradients(model, inputs):
    """Return the gradient of all outputs' sum, each number with a weight of its own."""
    weights = np.random.default_rng(1)

    def total(values):
        outputs, _ = model.stateless_call(values, [], inputs)
        return sum(
            ops.sum(x * weights.normal(size=x.shape).astype("float32"))
            for x in keras.tree.flatten(outputs)
        )

    values = [variable.value for variable in model.trainable_variables]
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(jax.grad(total))(values)
    import tensorflow as tf

    with tf.GradientTape() as tape:
        result = total(values)
    return tape.gradient(result, values)
