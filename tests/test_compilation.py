"""How plain TensorFlow graphs are run."""

import numpy as np
import pytest
from keras import ops

from kdiffusion import backend, compilation
from kdiffusion.models import kernels, winograd
from kdiffusion.models.layers import ResnetBlock

if backend.name() != "tensorflow" or backend.on_accelerator():
    pytest.skip("XLA compiles everything here", allow_module_level=True)

import tensorflow as tf  # noqa: E402  (only where it is used)


def doubled(numbers):
    return {"sum": 2.0 * numbers["x"] + numbers["y"]}


def calls_in(function, *arguments):
    graph = function.get_concrete_function(*arguments).graph
    return [op for op in graph.get_operations() if "PartitionedCall" in op.type]


def library_of(function, *arguments):
    return function.get_concrete_function(*arguments).graph.as_graph_def().library.function


def test_a_graph_goes_past_the_optimizer():
    run = compilation.compile_function(doubled, jit_compile=False)
    numbers = {name: ops.convert_to_tensor(np.ones(3, np.float32)) for name in "xy"}
    np.testing.assert_array_equal(run(numbers)["sum"], [3.0, 3.0, 3.0])
    (call,) = calls_in(run, numbers)
    options = tf.compat.v1.ConfigProto.FromString(call.get_attr("config_proto"))
    assert options.graph_options.rewrite_options.disable_meta_optimizer
    name = call.get_attr("f").name
    # Inlined into what surrounds it, it would be optimized after all.
    inner = library_of(run, numbers)
    assert [f.attr["_noinline"].b for f in inner if f.signature.name == name] == [True]


def test_the_options_of_others_stay():
    options = tf.config.optimizer
    before = options.get_experimental_options()

    def fails(x):
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        compilation.compile_function(fails, jit_compile=False)(ops.ones(1))
    assert options.get_experimental_options() == before


@pytest.mark.parametrize(
    "others, functions",
    [({}, 1), ({"epsilon": 0.1}, 2), ({"channels": 8}, 2), ({"dtype": "float16"}, 2)],
    ids=str,
)
def test_equal_layers_are_one_function_with_weights_of_their_own(others, functions):
    x = ops.convert_to_tensor(np.random.default_rng(0).normal(size=(1, 3, 5, 4)), "float32")
    settings = {"channels": 4, "num_groups": 2}
    layers = [ResnetBlock(**settings, name="first"), ResnetBlock(**{**settings, **others})]
    expected = layers[1](layers[0](x))
    run = compilation.compile_function(lambda x: layers[1](layers[0](x)), jit_compile=False)
    tolerance = 2e-3 if "dtype" in others else 1e-5
    np.testing.assert_allclose(run(x), expected, rtol=tolerance, atol=tolerance)
    names = [f.signature.name for f in library_of(run, x)]
    assert sum("compute" in name for name in names) == functions


def test_what_comes_after_waits():
    def scaled(weights, x):
        return compilation.after(weights, x) * 2.0 + x

    x = ops.ones(3)
    graph = tf.function(scaled).get_concrete_function(x, x).graph
    (waiting,) = (op for op in graph.get_operations() if op.control_inputs and op.outputs)
    assert [op.name for op in waiting.control_inputs] == ["x"]
    assert [tensor.op.name for tensor in waiting.inputs] == ["weights"]


@pytest.mark.parametrize("convolve", [winograd.convolve, kernels.convolve_doubled])
def test_kernels_are_transformed_when_they_are_needed(convolve):
    run = tf.function(lambda x, kernel: convolve(x, kernel))
    operations = run.get_concrete_function(ops.ones((1, 4, 4, 2)), ops.ones((3, 3, 2, 2))).graph
    waiting = [op for op in operations.get_operations() if op.control_inputs and op.outputs]
    assert [op.outputs[0].shape for op in waiting] == [(3, 3, 2, 2)]


def test_elements_are_computed_in_turn():
    def squares(x):
        return compilation.map_in_turn(lambda y: y * y, x, (2,), "float32")

    x = ops.reshape(ops.arange(6, dtype="float32"), (3, 2))
    run = tf.function(squares)
    np.testing.assert_array_equal(run(x), [[0, 1], [4, 9], [16, 25]])
    operations = run.get_concrete_function(x).graph.get_operations()
    (loop,) = (op for op in operations if "While" in op.type)
    assert loop.get_attr("parallel_iterations") == 1
