"""How plain TensorFlow graphs are run."""

import numpy as np
import pytest
from keras import ops

from kdiffusion import backend
from kdiffusion.models import kernels, winograd

if backend.name() != "tensorflow" or backend.on_accelerator():
    pytest.skip("XLA compiles everything here", allow_module_level=True)

import tensorflow as tf  # noqa: E402  (only where it is used)


def doubled(numbers):
    return {"sum": 2.0 * numbers["x"] + numbers["y"]}


def calls_in(function, *arguments):
    graph = function.get_concrete_function(*arguments).graph
    return [op for op in graph.get_operations() if "PartitionedCall" in op.type]


def test_a_graph_goes_past_the_optimizer():
    run = backend.compile_function(doubled, jit_compile=False)
    numbers = {name: ops.convert_to_tensor(np.ones(3, np.float32)) for name in "xy"}
    np.testing.assert_array_equal(run(numbers)["sum"], [3.0, 3.0, 3.0])
    (call,) = calls_in(run, numbers)
    options = tf.compat.v1.ConfigProto.FromString(call.get_attr("config_proto"))
    assert options.graph_options.rewrite_options.disable_meta_optimizer
    name = call.get_attr("f").name
    # Inlined into what surrounds it, it would be optimized after all.
    inner = run.get_concrete_function(numbers).graph.as_graph_def().library.function
    assert [f.attr["_noinline"].b for f in inner if f.signature.name == name] == [True]


def test_the_options_of_others_stay():
    options = tf.config.optimizer
    before = options.get_experimental_options()

    def fails(x):
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        backend.compile_function(fails, jit_compile=False)(ops.ones(1))
    assert options.get_experimental_options() == before


def test_what_comes_after_waits():
    def scaled(weights, x):
        return backend.after(weights, x) * 2.0 + x

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
        return backend.map_in_turn(lambda y: y * y, x, (2,), "float32")

    x = ops.reshape(ops.arange(6, dtype="float32"), (3, 2))
    run = tf.function(squares)
    np.testing.assert_array_equal(run(x), [[0, 1], [4, 9], [16, 25]])
    operations = run.get_concrete_function(x).graph.get_operations()
    (loop,) = (op for op in operations if "While" in op.type)
    assert loop.get_attr("parallel_iterations") == 1
