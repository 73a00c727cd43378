"""The public object, with the tiny random model."""

import inspect
import warnings

import keras
import numpy as np
import pytest
from families import model_of

from kdiffusion import Guidance, LatentDiffusion, Sampler, StableDiffusion
from kdiffusion.pipelines.settings import DrawSettings, Settings
from kdiffusion.runtime import backend
from kdiffusion.runtime.programs import Program
from kdiffusion.sampling.noise import noise_stream
from kdiffusion.weights.random_tiny import RandomSource

PROMPT = "a red circle"


def draw(model, prompt=PROMPT, **settings):
    settings = {"num_steps": 3, "seed": 42, "verbose": 0, **settings}
    return model.text_to_image(prompt, **settings)


def close(first, second):
    return np.abs(first.astype(int) - second.astype(int)).max() <= 1


def test_the_public_signature_is_the_settled_one():
    def names(function):
        return list(inspect.signature(function).parameters)

    keywords = "sampler spacing height width guidance callback verbose noise resume".split()
    assert names(StableDiffusion) == ["img_height", "img_width", "jit_compile", "preset", "dtype"]
    assert names(StableDiffusion.text_to_image)[1:] == [
        *"prompt negative_prompt batch_size num_steps unconditional_guidance_scale seed".split(),
        *keywords,
    ]
    for task, inputs in (
        (StableDiffusion.image_to_image, ["image", "prompt", "strength"]),
        (StableDiffusion.inpaint, ["image", "mask", "prompt", "strength"]),
    ):
        assert names(task)[1:] == [*inputs, *names(StableDiffusion.text_to_image)[2:]]
    assert names(StableDiffusion.generate_image)[1:] == [
        *"encoded_text negative_prompt batch_size num_steps".split(),
        *"unconditional_guidance_scale diffusion_noise seed".split(),
        *keywords,
    ]


def test_settings_show_their_defaults_and_what_they_do():
    for method in (StableDiffusion.text_to_image, LatentDiffusion.generate_image):
        parameters = inspect.signature(method).parameters
        assert set(DrawSettings.__annotations__) <= set(parameters)
        assert parameters["noise"].default == Settings().noise == "cpu"
        assert parameters["verbose"].kind is inspect.Parameter.KEYWORD_ONLY
        for name in DrawSettings.__annotations__:
            assert f"            {name}: " in method.__doc__


def test_an_unknown_setting_is_refused_with_the_known_ones(tiny):
    with pytest.raises(TypeError, match="text_to_image.. has no setting 'samplr'.*, sampler, "):
        draw(tiny, samplr="ddim")


def test_previews_are_small_images_of_the_latents(tiny):
    seen = []
    draw(tiny, callback=lambda step: seen.append((step.denoised, step.preview)))
    for latents, preview in seen:
        assert preview.shape == (1, 32, 32, 3) and preview.dtype == np.uint8
        np.testing.assert_array_equal(preview, tiny.preview(latents))


def test_the_constructor_reads_and_downloads_nothing():
    model = StableDiffusion(preset="no-such-preset")
    assert (model.img_height, model.img_width) == (512, 512)
    with pytest.raises(ValueError, match="stable-diffusion-v1-5.*"):
        model.text_encoder


def test_what_is_prepared_is_what_is_called_first(monkeypatch):
    """Each network's program is told of its first inputs, and the weights are read after that."""
    prepared, called, genuine = {}, {}, Program.__call__

    def form(tensors):
        described = keras.tree.map_structure(lambda x: (str(x.dtype), tuple(x.shape)), tensors)
        return keras.tree.flatten_with_path(described)

    def prepare(program, model, *tensors):
        prepared[model.name] = form(tensors), model.weights[0].numpy().copy()

    def call(program, model, *tensors):
        called.setdefault(model.name, form(tensors))
        return genuine(program, model, *tensors)

    def zeros(shape, dtype):
        return np.zeros(shape, dtype)

    monkeypatch.setattr(Program, "prepare", prepare)
    monkeypatch.setattr(Program, "__call__", call)
    monkeypatch.setattr(backend, "empty", zeros)
    model = StableDiffusion(preset="random-tiny", img_height=64, img_width=64)
    draw(model, batch_size=2, height=40, width=24, sampler="dpmpp_2m")
    assert set(prepared) == {"text_encoder", "diffusion_model", "image_decoder"}
    assert {name: form for name, (form, _) in prepared.items()} == called
    for name in ("text_encoder", "diffusion_model"):
        assert not prepared[name][1].any()


def test_pictures_are_uint8_and_of_the_size_asked_for(tiny):
    images = draw(tiny, batch_size=2, height=40, width=24)
    assert images.shape == (2, 40, 24, 3)
    assert images.dtype == np.uint8
    assert images.std() > 10
    assert draw(tiny).shape == (1, 64, 64, 3)


def test_the_same_seed_draws_the_same_picture(tiny):
    np.testing.assert_array_equal(draw(tiny), draw(tiny))
    assert not close(draw(tiny), draw(tiny, seed=43))
    assert not close(draw(tiny, seed=None), draw(tiny, seed=None))


@pytest.mark.parametrize(
    "settings",
    [
        {"prompt": "another thing"},
        {"negative_prompt": "ugly"},
        {"num_steps": 4},
        {"unconditional_guidance_scale": 3.0},
        {"unconditional_guidance_scale": 1.0},
        {"sampler": "euler_a"},
        {"sampler": Sampler("ddim", eta=1.0)},
        {"spacing": "trailing"},
        {"guidance": Guidance(rescale=1.0)},
        {"noise": "cuda"},
    ],
    ids=str,
)
def test_every_setting_changes_the_picture(tiny, settings):
    assert not close(draw(tiny, **settings), draw(tiny))


def test_a_scale_of_one_or_less_needs_no_negative_prompt(tiny):
    off = draw(tiny, unconditional_guidance_scale=1.0)
    np.testing.assert_array_equal(
        draw(tiny, unconditional_guidance_scale=0.0, negative_prompt="ugly"), off
    )


@pytest.mark.parametrize("sampler", ["ddim", "euler_a"])
def test_picture_i_of_a_batch_is_that_of_seed_plus_i(tiny, sampler):
    batch = draw(tiny, batch_size=3, sampler=sampler)
    for i in range(3):
        assert close(batch[i : i + 1], draw(tiny, seed=42 + i, sampler=sampler))


def test_prompts_come_one_after_the_other(tiny):
    images = draw(tiny, ["a cat", "a dog"], batch_size=2, negative_prompt=["x", "y"])
    assert len(images) == 4
    assert close(images[1:2], draw(tiny, "a cat", seed=43, negative_prompt="x"))
    assert close(images[2:3], draw(tiny, "a dog", seed=44, negative_prompt="y"))


def test_seeds_may_be_listed(tiny):
    images = draw(tiny, batch_size=2, seed=[7, 3])
    assert close(images[1:2], draw(tiny, seed=3))


def test_generate_image_equals_text_to_image(tiny):
    context = tiny.encode_text(PROMPT)
    assert context.shape == (1, 77, 32)
    settings = {"num_steps": 3, "seed": 42, "verbose": 0}
    for encoded in (context, context[0]):
        np.testing.assert_array_equal(tiny.generate_image(encoded, **settings), draw(tiny))
    mixed = np.concatenate([context, tiny.encode_text("other")])
    two = tiny.generate_image(mixed, batch_size=2, **settings)
    assert close(two[:1], draw(tiny))
    np.testing.assert_array_equal(tiny.generate_image(mixed, **settings), two)


def test_generate_image_starts_from_given_noise(tiny):
    noise = noise_stream(42).draw(8, 8, 4)
    context = tiny.encode_text(PROMPT)
    for start in (noise, noise[None]):
        images = tiny.generate_image(context, diffusion_noise=start, num_steps=3, verbose=0)
        np.testing.assert_array_equal(images, draw(tiny))


def test_a_callback_sees_the_steps_and_may_stop(tiny):
    steps = []
    draw(tiny, callback=steps.append)
    assert [step.step for step in steps] == [1, 2, 3]
    stopped = draw(tiny, callback=lambda step: False)
    np.testing.assert_array_equal(stopped, tiny.decode(steps[0].denoised))


def test_verbose_draws_a_progress_bar(tiny, capsys):
    draw(tiny, verbose=1)
    assert "3/3" in capsys.readouterr().out
    draw(tiny, verbose=0)
    assert capsys.readouterr().out == ""


def test_components_can_be_replaced_and_keep_kerascv_s_private_names():
    model = StableDiffusion.from_preset("random-tiny", jit_compile=False)
    before = draw(model)
    unet = model.diffusion_model
    model.diffusion_model = type(unet)(unet.architecture)
    after = draw(model)
    assert not close(after, before)
    model._diffusion_model = unet
    np.testing.assert_array_equal(draw(model), before)


def test_an_inpainting_network_draws_with_everything_masked():
    assert draw(model_of("inpainting")).shape == (1, 16, 24, 3)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"height": 60}, "height=60.*Use 64|height=60.*Use 56"),
        ({"width": 0}, "width"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"num_steps": 2.5}, "num_steps=2.5"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": "x"}, "seed"),
        ({"seed": [1, 2]}, "seed"),
        ({"sampler": "eular"}, "euler"),
        ({"spacing": "leding"}, "leading"),
        ({"noise": "gpu"}, "cuda"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt"),
        ({"prompt": []}, "prompt"),
        ({"unconditional_guidance_scale": float("nan")}, "unconditional_guidance_scale"),
    ],
    ids=str,
)
def test_bad_settings_say_what_they_are(tiny, settings, message):
    with pytest.raises(ValueError, match=message):
        draw(tiny, **settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"diffusion_noise": np.zeros((8, 8, 4)), "seed": 1}, "diffusion_noise"),
        ({"diffusion_noise": np.zeros((4, 8, 8))}, r"\(8, 8, 4\)"),
        ({"encoded_text": np.zeros((3, 77, 32)), "batch_size": 2}, "encoded_text"),
        ({"encoded_text": np.zeros(32)}, "encoded_text"),
        ({"encoded_text": np.zeros((77, 31))}, "31"),
    ],
    ids=lambda value: value if isinstance(value, str) else ", ".join(value),
)
def test_bad_inputs_of_generate_image_say_what_they_are(tiny, settings, message):
    settings = {"encoded_text": np.zeros((77, 32)), "num_steps": 1, "verbose": 0, **settings}
    with pytest.raises(ValueError, match=message):
        tiny.generate_image(**settings)


@pytest.mark.parametrize("size", [(500, 512), (512, 0), (512.5, 512)])
def test_sizes_are_never_rounded_silently(size):
    with pytest.raises(ValueError, match="multiple of 8"):
        StableDiffusion(*size)


def test_an_unknown_compile_policy_is_refused():
    with pytest.raises(ValueError, match="jit_compile='always'"):
        StableDiffusion(jit_compile="always")


def test_a_sampler_that_is_not_there_is_served_by_ddim_with_a_warning(tiny, monkeypatch):
    expected = draw(tiny)
    monkeypatch.setattr(
        RandomSource, "sampling", lambda self: ("new", RandomSource().schedule and _spacing())
    )
    with pytest.warns(UserWarning, match="'new'.*'ddim'"):
        images = draw(tiny)
    np.testing.assert_array_equal(images, expected)


def _spacing():
    from kdiffusion.sampling.spacing import Spacing

    return Spacing()


def test_truncated_prompts_warn(tiny):
    with pytest.warns(UserWarning, match="zebra"):
        tiny.encode_text("x " * 76 + "zebra")


def test_a_half_decoder_that_overflows_is_run_again_in_float32():
    if keras.backend.backend() == "jax":
        pytest.skip("JAX has no float16 kernels on the CPU")
    model = StableDiffusion.from_preset("random-tiny", jit_compile=False, dtype="mixed_float16")
    kernel = next(v for v in model.decoder.variables if v.path == "conv_in/kernel")
    latents = np.random.default_rng(0).normal(size=(1, 8, 8, 4)).astype("float32")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.decode(latents)
    kernel.assign(kernel * 3e5)
    with pytest.warns(UserWarning, match="float32"):
        picture = model.decode(latents)
    assert picture.std() > 10
    kernel.assign(kernel * np.inf)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="NaN or infinite"):
        model.decode(latents)


def test_pictures_are_rounded_not_truncated(tiny, monkeypatch):
    from kdiffusion.images import to_uint8

    assert to_uint8(np.array([-2.0, -1.0, 0.0, 0.9999, 2.0])).tolist() == [0, 0, 128, 255, 255]
