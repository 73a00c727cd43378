"""Plain TensorFlow graphs, read from their bytes and kept between runs."""

import functools
import json
import zipfile

import keras
import numpy as np
import pytest
from keras import ops

from kdiffusion.models import kernels
from kdiffusion.models.architectures import DiffusionArchitecture
from kdiffusion.models.diffusion_model import DiffusionModel
from kdiffusion.models.layers.norms import GroupNorm
from kdiffusion.runtime import backend, cache_folder, graph_files, plain_graph
from kdiffusion.runtime.programs import Program
from kdiffusion.sampling import run as generation

if backend.name() != "tensorflow" or backend.on_accelerator():
    pytest.skip("XLA compiles everything here", allow_module_level=True)

import tensorflow as tf  # noqa: E402  (only where it is used)

INPUTS = np.ones((1, 3), np.float32)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(cache_folder.VARIABLE, str(tmp_path / "programs"))
    return tmp_path / "programs"


@pytest.fixture
def count(monkeypatch):
    """Return a list as long as there were traced functions."""
    functions, genuine = [], plain_graph.traced

    @functools.wraps(genuine)  # else it would be code of others, and nothing would be kept
    def traced(function, arguments):
        functions.append(function)
        return genuine(function, arguments)

    monkeypatch.setattr(plain_graph, "traced", traced)
    return functions


def network(**settings):
    """Always with the same weights: what they begin with is part of a Keras model's settings."""
    start = keras.initializers.GlorotUniform(seed=0)
    last = keras.layers.Dense(2, name="last", kernel_initializer=start, **settings)
    return keras.Sequential([keras.Input((3,), name="x"), last], name="network")


def unet(initialize=True, dtype=None, gradient_checkpointing=False, **fields):
    small = {"channels": (4, 8), "layers_per_level": 1, "depths": (0, 1), "mid_depth": 0}
    fields = {**small, "num_heads": (2, 2), "num_groups": 2, "context_width": 4, **fields}
    return DiffusionModel(
        DiffusionArchitecture(**fields),
        initialize=initialize,
        dtype=dtype,
        gradient_checkpointing=gradient_checkpointing,
    )


def predicted(model, inputs=INPUTS):
    return ops.convert_to_numpy(Program(_predict, jit_compile=False)(model, inputs))


def _predict(model, inputs):
    return model(inputs)


_predict.__module__ = "kdiffusion.tests"  # else it would be code that nobody knows


def test_outputs_are_packed_as_they_were():
    def function(numbers, unused, pair):
        return {"sum": numbers["x"] + pair[0], "parts": [pair[1], {"x": numbers["x"]}]}

    one, two = np.ones(2, np.float32), np.full(2, 2.0, np.float32)
    result = plain_graph.PlainGraph(function)({"x": one}, np.zeros(7), (one, two))
    assert set(result) == {"sum", "parts"}
    np.testing.assert_array_equal(result["sum"], [2.0, 2.0])
    np.testing.assert_array_equal(result["parts"][0], two)
    np.testing.assert_array_equal(result["parts"][1]["x"], one)


def test_there_is_a_graph_for_each_structure_and_shape(count):
    run = plain_graph.PlainGraph(lambda x: sum(x.values()) if isinstance(x, dict) else x)
    for x in (np.ones(2), np.zeros(2), np.ones(3), {"a": np.ones(2)}, {"b": np.ones(2)}):
        np.testing.assert_array_equal(run(x), next(iter(x.values())) if isinstance(x, dict) else x)
    assert len(count) == 4


def test_variables_are_read_when_a_graph_runs():
    weight, around = tf.Variable([1.0, 2.0]), tf.Variable(1.0)
    run = plain_graph.PlainGraph(lambda weights, x: weights[0] * x + around)
    np.testing.assert_array_equal(run([weight], np.float32(3.0)), [4.0, 7.0])
    weight.assign([5.0, 6.0])
    around.assign(0.0)
    np.testing.assert_array_equal(run([weight], np.float32(1.0)), [5.0, 6.0])


def test_functions_bear_names_that_tell_graphs_apart():
    def names(function):
        graph = plain_graph.traced(function, (tf.ones(2),))
        functions = graph.definition.library.function
        names = {function.signature.name for function in functions}
        called = {n.attr["f"].func.name for f in functions for n in f.node_def if "f" in n.attr}
        assert names == called | {graph.main}
        return names

    def nested(x):
        return tf.function(lambda y: y * 2.0)(x) + 1.0

    one, other, third = names(lambda x: x + 1.0), names(lambda x: x + 2.0), names(nested)
    assert len(one) == len(other) == 1 and len(third) == 2
    assert not one & other | one & third | other & third


def test_a_kept_graph_is_not_traced_again(folder, count):
    model = network()
    expected = predicted(model)
    (path,) = folder.glob("*.graph")
    np.testing.assert_array_equal(predicted(model), expected)
    other = network()
    other.set_weights([2.0 * value for value in model.get_weights()])
    np.testing.assert_array_equal(predicted(other), 2.0 * expected)
    assert len(count) == 1
    assert list(folder.glob("*.graph")) == [path]


@pytest.fixture
def threads(monkeypatch):
    """Wait for all the threads that were started, as a function of no arguments."""
    started, genuine = [], plain_graph.threading.Thread

    def thread(**settings):
        started.append(genuine(**settings))
        return started[-1]

    monkeypatch.setattr(plain_graph.threading, "Thread", thread)
    return lambda: [thread.join() for thread in started]


def test_a_kept_graph_is_loaded_ahead(folder, count, threads, monkeypatch):
    model = network()
    expected = predicted(model)
    program = Program(_predict, jit_compile=False)
    program.prepare(model, np.zeros_like(INPUTS))
    assert len(threads()) == 1
    monkeypatch.setattr(graph_files, "read", pytest.fail)
    np.testing.assert_array_equal(program(model, INPUTS), expected)
    program.prepare(model, INPUTS)
    assert len(threads()) == len(count) == 1


def test_nothing_is_loaded_ahead_that_is_not_kept(folder, count, threads):
    model, program = network(), Program(_predict, jit_compile=False)
    program.prepare(model, INPUTS)
    assert not threads() and not count
    np.testing.assert_array_equal(program(model, INPUTS), predicted(model))


def test_a_graph_that_cannot_be_loaded_ahead_is_traced(folder, count, threads):
    model = network()
    expected = predicted(model)
    (path,) = folder.glob("*.graph")
    cut(path)
    program = Program(_predict, jit_compile=False)
    program.prepare(model, INPUTS)
    assert len(threads()) == 1
    np.testing.assert_array_equal(program(model, INPUTS), expected)
    assert len(count) == 2


def test_a_graph_is_instantiated_and_nothing_computed():
    total, ones = tf.Variable(0.0), tf.ones(1)
    graph = plain_graph.traced(lambda x: total.assign_add(x[0]), (ones,))
    run = plain_graph.loaded(graph)
    run.instantiate(ones)
    assert total.numpy() == 0.0
    run(ones)
    assert total.numpy() == 1.0


def test_functions_that_are_called_once_become_parts_of_their_callers():
    def function():
        return tf.function(lambda x: x * 2.0, experimental_attributes={"_noinline": True})

    once, twice = function(), function()
    graph = plain_graph.traced(lambda x: once(x) + twice(twice(x)), (tf.ones(2),))
    kept = [f for f in graph.definition.library.function if "_noinline" in f.attr]
    assert len(kept) == 1
    calls = [n for f in graph.definition.library.function for n in f.node_def if "f" in n.attr]
    called = [node.attr["f"].func.name for node in calls]
    assert called.count(kept[0].signature.name) == 2
    np.testing.assert_array_equal(plain_graph.loaded(graph)(tf.ones(2)), [6.0, 6.0])


@pytest.mark.parametrize(
    "settings, traced",
    [({}, 0), ({"activation": "relu"}, 1), ({"dtype": "mixed_bfloat16"}, 1)],
    ids=str,
)
def test_another_computation_is_another_graph(folder, count, settings, traced):
    predicted(network())
    predicted(network(**settings))
    assert len(count) == 1 + traced


def test_whatever_a_network_computes_is_in_its_identity():
    def identity(model):
        return graph_files.identity_of(generation.denoise, model)

    plain, changed = unet(), unet()
    assert identity(plain) == identity(changed) == identity(unet(initialize=False))
    for fields in ({"epsilon": 0.5}, {"num_groups": 4}, {"num_heads": (1, 1)}):
        assert identity(unet(**fields)) != identity(plain)
    assert identity(unet(dtype="mixed_bfloat16")) != identity(plain)
    assert identity(unet(gradient_checkpointing=True)) != identity(plain)
    assert graph_files.identity_of(generation.sample, plain) != identity(plain)
    changed.get_layer("down_1_transformer_0").blocks[0].norm2.epsilon = 0.5
    assert identity(changed) != identity(plain)


def test_other_shapes_and_other_code_are_other_graphs(folder, count, monkeypatch):
    model = network()
    predicted(model)
    predicted(model, np.ones((2, 3), np.float32))
    assert len(count) == 2
    later = functools.wraps(graph_files._surroundings)(lambda: "a later version")
    monkeypatch.setattr(graph_files, "_surroundings", later)
    predicted(model)
    assert len(count) == 3
    assert len(list(folder.glob("*.graph"))) == 3


class Own(keras.layers.Dense):
    pass


@pytest.mark.parametrize(
    "model, function",
    [
        (keras.Sequential([keras.Input((2,)), Own(2)]), generation.denoise),
        (keras.Sequential([keras.Input((2,)), keras.layers.Lambda(abs)]), generation.denoise),
        (keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)]), lambda model: 0),
        (keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)]), pytest.skip),
    ],
    ids=["layer", "lambda", "function", "other library"],
)
def test_code_of_others_has_no_identity(model, function):
    assert graph_files.identity_of(function, model) is None


def test_a_changed_method_has_no_identity():
    model = network()
    assert graph_files.identity_of(generation.denoise, model) is not None
    model.get_layer("last").call = lambda x: x
    assert graph_files.identity_of(generation.denoise, model) is None


@pytest.mark.parametrize(
    "place, name", [(kernels, "attend"), (GroupNorm, "call"), (ops, "gelu")], ids=str
)
def test_a_function_in_place_of_another_has_no_identity(monkeypatch, place, name):
    model, genuine = unet(), getattr(place, name)
    assert graph_files.identity_of(generation.denoise, model) is not None
    monkeypatch.setattr(place, name, lambda *arguments: genuine(*arguments))
    assert graph_files.identity_of(generation.denoise, model) is None


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def damage(path):
    with zipfile.ZipFile(path) as file:
        part = file.getinfo("graph.pb")
    content = bytearray(path.read_bytes())
    content[part.header_offset + 30 + len(part.filename) + part.compress_size // 2] ^= 0xFF
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def strip(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("signature.json", json.dumps({"main": ""}))
        file.writestr("kernels.json", "{}")
        file.writestr("graph.pb", b"")


def exchange(path):
    with zipfile.ZipFile(path) as file:
        signature, kernels = file.read("signature.json"), file.read("kernels.json")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("signature.json", signature)
        file.writestr("kernels.json", kernels)
        file.writestr("graph.pb", b"")


def test_what_json_cannot_tell_is_not_kept(folder):
    run = plain_graph.PlainGraph(lambda x: (x, {"twice": 2.0 * x}), lambda: "a pair")
    for _ in range(2):
        result = run(np.ones(2, np.float32))
        assert isinstance(result, tuple)
        np.testing.assert_array_equal(result[1]["twice"], [2.0, 2.0])
    assert not list(folder.iterdir())


@pytest.mark.parametrize("spoil", [cut, damage, empty, strip, exchange])
def test_a_spoilt_file_is_written_anew(folder, count, spoil):
    model = network()
    expected = predicted(model)
    (path,) = folder.glob("*.graph")
    spoil(path)
    np.testing.assert_array_equal(predicted(model), expected)
    assert len(count) == 2
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None


def test_a_full_disk_fails_nothing(folder, count, monkeypatch):
    def full(*arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(graph_files.os, "replace", full)
    model = network()
    np.testing.assert_array_equal(predicted(model), predicted(model))
    assert len(count) == 2
    assert not list(folder.iterdir())


def test_nothing_is_kept_where_that_is_switched_off(tmp_path, monkeypatch, count):
    monkeypatch.setenv(cache_folder.VARIABLE, "off")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = network()
    np.testing.assert_array_equal(predicted(model), predicted(model))
    assert len(count) == 2
    assert not list(tmp_path.iterdir())
