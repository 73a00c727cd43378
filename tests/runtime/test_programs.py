"""Plain TensorFlow graphs and the functions inside them."""

import numpy as np
import pytest
from keras import ops

from kdiffusion.models.kernels import convolution, winograd
from kdiffusion.models.layers.residual import ResnetBlock
from kdiffusion.runtime import backend, plain_graph, programs, tracing

if backend.name() != "tensorflow" or backend.on_accelerator():
    pytest.skip("XLA compiles everything here", allow_module_level=True)

import tensorflow as tf  # noqa: E402  (only where it is used)


def doubled(numbers):
    return {"sum": 2.0 * numbers["x"] + numbers["y"]}


def test_a_graph_goes_past_the_optimizer(monkeypatch):
    genuine, configs = tf.raw_ops.StatefulPartitionedCall, []

    def call(**settings):
        configs.append(settings["config_proto"])
        return genuine(**settings)

    def nested(numbers):
        return tf.function(doubled)(numbers)

    monkeypatch.setattr(tf.raw_ops, "StatefulPartitionedCall", call)
    numbers = {name: ops.convert_to_tensor(np.ones(3, np.float32)) for name in "xy"}
    run = programs.compile_function(nested, jit_compile=False)
    np.testing.assert_array_equal(run(numbers)["sum"], [3.0, 3.0, 3.0])
    graph = plain_graph.traced(nested, (numbers,)).definition
    calls = [n for f in graph.library.function for n in f.node_def if "config_proto" in n.attr]
    assert len(configs) == len(calls) == 1
    for config in (*configs, calls[0].attr["config_proto"].s):
        options = tf.compat.v1.ConfigProto.FromString(config)
        assert options.graph_options.rewrite_options.disable_meta_optimizer


def test_the_options_of_others_stay():
    options = tf.config.optimizer
    before = options.get_experimental_options()

    def fails(x):
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        programs.compile_function(fails, jit_compile=False)(ops.ones(1))
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

    def both(x):
        return layers[1](layers[0](x))

    run = programs.compile_function(both, jit_compile=False)
    tolerance = 2e-3 if "dtype" in others else 1e-5
    np.testing.assert_allclose(run(x), expected, rtol=tolerance, atol=tolerance)
    # One function is that of the whole graph.
    assert len(plain_graph.traced(both, (x,)).definition.library.function) == 1 + functions


def test_what_comes_after_waits():
    def scaled(weights, x):
        return tracing.after_computing(weights, x) * 2.0 + x

    x = ops.ones(3)
    graph = tf.function(scaled).get_concrete_function(x, x).graph
    (waiting,) = (op for op in graph.get_operations() if op.control_inputs and op.outputs)
    assert [op.name for op in waiting.control_inputs] == ["x"]
    assert [tensor.op.name for tensor in waiting.inputs] == ["weights"]


@pytest.mark.parametrize("convolve", [winograd.convolve, convolution.convolve_doubled])
def test_kernels_are_transformed_when_they_are_needed(convolve):
    run = tf.function(lambda x, kernel: convolve(x, kernel, ops.zeros(2)))
    graph = run.get_concrete_function(ops.ones((1, 4, 4, 2)), ops.ones((3, 3, 2, 2))).graph
    x, kernel = graph.inputs
    # Gradients go through IdentityN.
    transforms = [op for op in kernel.consumers() if op.type != "IdentityN"]
    assert transforms
    assert all(op.control_inputs == [x.op] for op in transforms)


def test_rows_of_a_kernel_are_transformed_in_turn():
    run = tf.function(lambda x, kernel: winograd.convolve(x, kernel, ops.zeros(2)))
    graph = run.get_concrete_function(ops.ones((1, 4, 4, 2)), ops.ones((3, 3, 2, 2))).graph
    products = [op for op in graph.get_operations() if op.type == "BatchMatMulV2"]
    assert len(products) == 6
    for before, product in zip(products, products[1:]):
        assert before in _all_that_come_before(product)


def _all_that_come_before(operation):
    found, open_ones = set(), [operation]
    while open_ones:
        op = open_ones.pop()
        new = {*(x.op for x in op.inputs), *op.control_inputs} - found
        found |= new
        open_ones.extend(new)
    return found


def test_large_feature_maps_are_let_go(monkeypatch):
    layers = [ResnetBlock(4, num_groups=2) for _ in range(2)]
    x = ops.ones((1, 4, 4, 4))

    def both(x):
        return layers[1](layers[0](x))

    both(x)
    functions = []
    for bound in (64, 63):
        monkeypatch.setattr(tracing, "_SHARED_ELEMENTS", bound)
        functions.append(len(plain_graph.traced(both, (x,)).definition.library.function))
    assert functions == [2, 1]


def test_tensors_are_computed_in_turn_into_their_places():
    def squares(x):
        return tracing.stack_in_turn(
            lambda i: (x[i] + ops.zeros(2)) ** 2, 3, (2,), "float32", first=x
        )

    x = ops.convert_to_tensor([1.0, 2.0, 3.0])
    expected = [[1, 1], [4, 4], [9, 9]]
    np.testing.assert_array_equal(squares(x), expected)
    run = tf.function(lambda x: squares(2.0 * x))
    np.testing.assert_array_equal(run(x / 2.0), expected)
    operations = run.get_concrete_function(x).graph.get_operations()
    (loop,) = (op for op in operations if "While" in op.type)
    assert loop.get_attr("parallel_iterations") == 1
    # Memory that is taken before it is needed takes the place of what could use it again.
    (empty,) = (op for op in operations if op.type == "Empty")
    (shape,) = empty.inputs
    assert [op.type for op in shape.op.control_inputs] == ["Mul"]


def test_elements_are_computed_in_turn():
    def squares(x):
        return tracing.map_in_turn(lambda y: y * y, x, (2,), "float32")

    x = ops.reshape(ops.arange(6, dtype="float32"), (3, 2))
    run = tf.function(squares)
    np.testing.assert_array_equal(run(x), [[0, 1], [4, 9], [16, 25]])
    operations = run.get_concrete_function(x).graph.get_operations()
    (loop,) = (op for op in operations if "While" in op.type)
    assert loop.get_attr("parallel_iterations") == 1
