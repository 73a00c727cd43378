"""The loop, guidance and compiled programs, with networks that can be worked out by hand."""

import keras
import numpy as np
import pytest
from keras import ops

from kdiffusion.runtime.programs import Program
from kdiffusion.sampling import loop
from kdiffusion.sampling import run as generation
from kdiffusion.sampling.guidance import Guidance, classifier_free
from kdiffusion.sampling.noise import noise_stream
from kdiffusion.sampling.run import Run
from kdiffusion.sampling.samplers import SAMPLERS, Sampler, make_table
from kdiffusion.sampling.schedule import Schedule
from kdiffusion.sampling.spacing import Spacing

pytestmark = pytest.mark.backend

SHAPE = (2, 3, 4, 1)


class Network(keras.Model):
    """x * weight + timestep / 1000 + the mean of the context."""

    def __init__(self, weight=0.5):
        super().__init__()
        self.weight = self.add_weight(shape=(), initializer="zeros", name="weight")
        self.weight.assign(weight)

    def call(self, inputs):
        shift = inputs["timestep"] / 1000.0 + ops.mean(inputs["context"], axis=(1, 2))
        return inputs["latents"] * self.weight + ops.reshape(shift, (-1, 1, 1, 1))


@pytest.fixture(scope="module")
def program():
    return Program(generation.denoise, jit_compile=False)


def table_of(sampler, num_steps, **settings):
    return make_table(sampler, Schedule(), num_steps, Spacing(), **settings)


def make_run(tables, inputs=None, guided=None, scale=1.0, guidance=Guidance(), seed=5):
    streams = [noise_stream(seed + i) for i in range(len(tables))]
    start = np.stack([stream.draw(*SHAPE[1:]) for stream in streams])
    start *= np.array([t.start_scale for t in tables], "float32").reshape(-1, 1, 1, 1)
    inputs = inputs or {"context": np.zeros((len(tables), 2, 2), "float32")}
    scales = np.full(len(tables), scale)
    return Run(tables, start, inputs, guided or {}, scales, guidance, streams)


def run(program, tables, model=None, on_step=None, resume=None, **settings):
    model = model or Network()
    return generation.sample(program, model, make_run(tables, **settings), on_step, resume)


def by_hand(table, weight=0.5, shift=0.0, seed=5):
    """The same run in float64, row by row."""
    stream = noise_stream(seed)
    registers = np.zeros((5, *SHAPE[1:]))
    registers[0] = table.start_scale * stream.draw(*SHAPE[1:])
    shifts = np.broadcast_to(shift, len(table.timesteps))
    for row in range(len(table.timesteps)):
        output = registers[0] * weight + table.timesteps[row] / 1000.0 + shifts[row]
        denoised = table.skip[row] * registers[0] + table.out[row] * output
        noise = stream.draw(*SHAPE[1:]) if table.draws_noise[row] else np.zeros(SHAPE[1:])
        sources = np.stack([*registers, denoised, output, noise])
        registers = np.tensordot(table.next[row], sources, 1)
    return registers[0]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_loop_runs_every_sampler_as_its_table_says(program, sampler):
    for num_steps in (3, 20):
        table = table_of(sampler, num_steps)
        np.testing.assert_allclose(run(program, [table])[0], by_hand(table), rtol=2e-4, atol=2e-4)


def test_images_of_a_batch_may_differ_in_sampler_and_steps(program):
    tables = [table_of("dpmpp_2m", 20), table_of("euler_a", 3)]
    together = run(program, tables)
    alone = [run(program, [table], seed=5 + i)[0] for i, table in enumerate(tables)]
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_blocks_and_single_rows_give_the_same_latents(monkeypatch):
    """As on a GPU, where rows go one at a time only while somebody watches."""
    monkeypatch.setattr(generation.backend, "on_accelerator", lambda: True)
    program, tables = Program(generation.denoise, jit_compile=False), [table_of("euler_a", 20)]
    whole, watched = run(program, tables), run(program, tables, on_step=lambda step: None)
    np.testing.assert_array_equal(whole, watched)


def test_callbacks_see_every_step_and_may_stop(program):
    steps = []
    run(program, [table_of("heun", 5)], on_step=steps.append)
    assert [(step.step, step.num_steps) for step in steps] == [(i, 5) for i in range(1, 6)]
    assert steps[0].denoised.shape == (1, *SHAPE[1:])

    def stop_at_two(step):
        return step.step < 2

    stopped = run(program, [table_of("heun", 5)], on_step=stop_at_two)
    np.testing.assert_array_equal(stopped, steps[1].denoised)


def test_a_step_shows_its_estimate_as_its_pipeline_does():
    latents = np.ones((2, 3, 4, 4), "float32")
    state = generation.State(1, np.zeros((5, *latents.shape), "float32"))
    step = generation.Step(1, 2, latents, state, lambda shown: shown + 1)
    np.testing.assert_array_equal(step.preview, latents + 1)
    with pytest.raises(ValueError, match="no preview"):
        generation.Step(1, 2, latents, state).preview


# One with the most memories, one that also draws noise: a state holds whatever the loop has.
@pytest.mark.parametrize("sampler", [Sampler("unipc", order=3), "dpmpp_3m_sde"], ids=str)
def test_a_run_resumed_at_any_step_is_the_uninterrupted_one(program, sampler):
    table = table_of(sampler, 19)
    steps = []
    whole = run(program, [table], on_step=steps.append)
    for step in steps:
        np.testing.assert_array_equal(run(program, [table], resume=step.state), whole)


def test_a_run_of_any_sampler_can_be_resumed(program):
    tables = [table_of(sampler, 5) for sampler in SAMPLERS]
    steps = []
    whole = run(program, tables, on_step=steps.append)
    np.testing.assert_array_equal(run(program, tables, resume=steps[1].state), whole)


def test_a_state_of_another_run_is_refused(program):
    table = table_of("ddim", 4)
    for state in (
        generation.State(9, np.zeros((5, 1, *SHAPE[1:]), "float32")),
        generation.State(1, np.zeros((5, 2, *SHAPE[1:]), "float32")),
    ):
        with pytest.raises(ValueError, match="resume"):
            run(program, [table], resume=state)


def test_steps_outside_the_interval_are_not_guided(program):
    context = np.concatenate([np.full((1, 2, 2), 0.1), np.full((1, 2, 2), 0.3)]).astype("float32")
    inputs = {"context": context[1:]}
    guided = {"context": context, "guidance_rescale": np.zeros(1, "float32")}
    table = table_of("euler", 4)
    sizes = []

    class Watched(Network):
        def call(self, inputs):
            sizes.append(inputs["context"].shape[0])
            return super().call(inputs)

    model = Watched()
    settings = {"inputs": inputs, "guided": guided, "scale": 7.5}
    some = run(program, [table], model, guidance=Guidance(interval=(0.25, 0.75)), **settings)
    shifts = [0.3, 0.1 + 7.5 * 0.2, 0.1 + 7.5 * 0.2, 0.3]
    np.testing.assert_allclose(some[0], by_hand(table, shift=shifts), rtol=1e-4, atol=1e-4)
    assert set(sizes) == {1, 2}


def test_what_is_known_is_kept_at_the_level_of_each_step(program):
    table = table_of("ddim", 5)
    generator = np.random.default_rng(1)
    known, noise = generator.normal(size=(2, 1, *SHAPE[1:])).astype("float32")
    mask = np.zeros((1, *SHAPE[1:3], 1), "float32")
    mask[:, :, :2] = 1.0
    constraint = {"mask": mask, "known": known, "known_noise": noise}
    inputs = {"context": np.zeros((1, 2, 2), "float32"), **constraint}
    steps = []
    latents = run(program, [table], inputs=inputs, on_step=steps.append)
    np.testing.assert_array_equal(latents[:, :, 2:], known[:, :, 2:])
    for step, (a, s) in zip(steps[:-1], zip(table.a[1:], table.s[1:])):
        kept = step.state.registers[0][:, :, 2:]
        np.testing.assert_allclose(kept, (a * known + s * noise)[:, :, 2:], atol=1e-6)
    assert np.abs(latents - known)[:, :, :2].min() > 1e-4


def test_an_interrupt_leaves_everything_usable(program):
    def interrupt(step):
        raise KeyboardInterrupt

    table = table_of("ddim", 4)
    before = run(program, [table])
    with pytest.raises(KeyboardInterrupt):
        run(program, [table], on_step=interrupt)
    np.testing.assert_array_equal(run(program, [table]), before)


def test_latents_that_are_not_finite_raise_and_name_the_image(program):
    model = Network(weight=np.inf)
    with pytest.raises(ValueError, match="image 0, 1 .* call 1 of 3"):
        run(program, [table_of("ddim", 3)] * 2, model)


def test_guidance_moves_from_the_negative_to_the_positive_prediction(program):
    context = np.concatenate([np.full((1, 2, 2), 0.1), np.full((1, 2, 2), 0.3)]).astype("float32")
    table = table_of("euler", 5)
    guided_inputs = {"context": context, "guidance_rescale": np.zeros(1, "float32")}
    inputs = {"context": context[1:]}
    for scale in (1.0, 7.5):
        guided = run(program, [table], inputs=inputs, guided=guided_inputs, scale=scale)[0]
        expected = by_hand(table, shift=0.1 + scale * 0.2)
        np.testing.assert_allclose(guided, expected, rtol=1e-4, atol=1e-4)


def test_rescaling_gives_back_the_deviation_of_the_positive_prediction():
    x = np.random.default_rng(0).normal(size=SHAPE).astype("float32")

    def predict(x, timestep):
        return ops.concatenate([0.5 * x, 2.0 * x])

    one = np.ones(2, "float32")
    guided = classifier_free(predict, 7.5 * one, one)(x, one)
    deviation = np.std(ops.convert_to_numpy(guided), axis=(1, 2, 3))
    np.testing.assert_allclose(deviation, np.std(2 * x, axis=(1, 2, 3)), rtol=1e-5)
    plain = classifier_free(predict, 7.5 * one, 0.0 * one)(x, one)
    np.testing.assert_allclose(ops.convert_to_numpy(plain), (0.5 + 7.5 * 1.5) * x, rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{"rescale": -0.1}, {"rescale": 1.5}, {"interval": (0.5, 0.5)}, {"interval": (0.0, 1.1)}],
    ids=str,
)
def test_guidance_refuses_values_out_of_range(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Guidance(**settings)


def test_conditioning_is_joined_to_the_latents(program):
    class Widest(keras.Model):
        def call(self, inputs):
            return ops.sum(inputs["latents"], axis=-1, keepdims=True)

    conditioning = np.full((1, *SHAPE[1:3], 2), 0.25, "float32")
    table = table_of("ddim", 1)._replace(start_scale=0.0)
    latents = run(program, [table], Widest(), inputs={"conditioning": conditioning})
    expected = table.next[0][0] @ [0, 0, 0, 0, 0, table.out[0] * 0.5, 0.5, 0]
    np.testing.assert_allclose(latents, expected, rtol=1e-4)


def test_a_program_sees_new_weights_and_another_model():
    traced = []

    def twice(model, x):
        traced.append(x)
        return 2.0 * model.weight * x

    program = Program(twice, jit_compile=False)
    x = ops.convert_to_tensor(np.float32(3.0))
    model = Network(1.0)
    assert float(program(model, x)) == 6.0
    model.weight.assign(2.0)
    assert float(program(model, x)) == 12.0
    model.architecture = other = "the same architecture"
    replaced = Network(10.0)
    replaced.architecture = other
    assert float(program(model, x)) == 12.0
    count = len(traced)
    assert float(program(replaced, x)) == 60.0
    assert len(traced) == count


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_program_tells_architectures_of_the_same_shapes_apart(jit_compile):
    program = Program(lambda model, x: model.power * model.weight * x, jit_compile)
    x = ops.convert_to_tensor(np.float32(3.0))
    for power in (1.0, 2.0, 1.0):
        model = Network(1.0)
        model.architecture = model.power = power
        assert float(program(model, x)) == 3.0 * power


def test_the_loop_stops_where_it_is_told():
    table = table_of("ddim", 4)
    rows = generation.pack([table], loop.BLOCK)
    noise = np.zeros((loop.BLOCK, 1, *SHAPE[1:]), "float32")
    arrays = rows.timesteps, rows.prediction, rows.next, rows.landing, noise
    block = loop.RowBlock(*(ops.convert_to_tensor(array) for array in arrays))
    calls = []

    def predict(x, timestep):
        calls.append(timestep)
        return x

    registers = ops.ones((5, 1, *SHAPE[1:]))
    whole = loop.run(predict, registers, block, np.int32(0), np.int32(4))
    half = loop.run(predict, registers, block, np.int32(0), np.int32(2))
    halves = loop.run(predict, half["registers"], block, np.int32(2), np.int32(4))
    np.testing.assert_array_equal(
        ops.convert_to_numpy(halves["registers"]), ops.convert_to_numpy(whole["registers"])
    )
    nothing = loop.run(predict, registers, block, np.int32(4), np.int32(4))
    np.testing.assert_array_equal(ops.convert_to_numpy(nothing["registers"]), 1.0)
