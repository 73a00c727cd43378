"""The picture of the samplers, as what is on it rather than how it looks."""

import builtins

import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from PIL import Image

from kdiffusion import Spacing
from kdiffusion.sampling.plots import plot_samplers
from kdiffusion.sampling.samplers import SAMPLERS, make_table
from kdiffusion.sampling.schedule import Schedule


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved."""
    saved = []

    def save(figure, path, **settings):
        saved.append(figure)

    monkeypatch.setattr(Figure, "savefig", save)
    return saved


def panels(figure):
    """The pair of axes of each sampler, by its name; the colour bar has no name."""
    axes = figure.axes[:-1]
    return {above.get_title("left"): (above, below) for above, below in zip(*[iter(axes)] * 2)}


def coefficients(axes):
    (mesh,) = (each for each in axes.collections if isinstance(each, QuadMesh))
    rows = [label.get_text() for label in axes.get_yticklabels()]
    return rows, mesh.get_array()


def test_every_sampler_has_a_panel_with_its_label(figures):
    plot_samplers("unused.png", num_steps=5)
    drawn = panels(figures[0])
    assert list(drawn) == list(SAMPLERS)
    labels = {name: above.get_title("right") for name, (above, _) in drawn.items()}
    assert labels == {name: record.label for name, record in SAMPLERS.items()}


@pytest.mark.parametrize("name", ["euler_a", "heun", "pndm", "dpmpp_3m_sde"])
def test_a_panel_shows_the_levels_and_the_coefficients_of_the_table(name, figures):
    spacing = Spacing("trailing")
    plot_samplers("unused.png", [name], 7, spacing)
    table = make_table(name, Schedule(), 7, spacing)
    above, below = panels(figures[0])[name]
    sigmas = above.lines[0].get_ydata()
    np.testing.assert_allclose(sigmas, table.s / table.a)
    rows, shown = coefficients(below)
    sources = ["x", *(f"memory {i}" for i in range(1, 5)), "denoised", "network", "noise"]
    used = [source for source, column in zip(sources, table.next[:, 0].T) if column.any()]
    assert rows == used
    expected = table.next[:, 0, [sources.index(row) for row in rows]].T
    np.testing.assert_array_equal(shown.filled(0.0), expected)
    assert above.get_xlim() == (0, 7)


def test_the_second_call_of_a_step_is_in_its_second_half(figures):
    plot_samplers("unused.png", ["heun"], 3)
    above, _ = panels(figures[0])["heun"]
    np.testing.assert_allclose(above.lines[0].get_xdata(), [0.25, 0.75, 1.25, 1.75, 2.5])


def test_a_sigma_spacing_is_left_out_where_a_sampler_takes_none(figures):
    plot_samplers("unused.png", ["ddim", "euler"], 6, Spacing(sigmas="karras"))
    drawn = panels(figures[0])
    for name, spacing in (("ddim", Spacing()), ("euler", Spacing(sigmas="karras"))):
        table = make_table(name, Schedule(), 6, spacing)
        np.testing.assert_allclose(drawn[name][0].lines[0].get_ydata(), table.s / table.a)


def test_pure_noise_can_be_drawn(figures, monkeypatch):
    schedule = Schedule(rescale_zero_terminal_snr=True, prediction="v")
    monkeypatch.setattr("kdiffusion.sampling.plots.Schedule", lambda: schedule)
    plot_samplers("unused.png", ["euler"], 4, Spacing("trailing"))
    assert np.isfinite(panels(figures[0])["euler"][0].lines[0].get_ydata()).all()


def test_the_file_is_a_picture_of_the_same_bytes_each_time(tmp_path):
    for name in ("first.png", "second.png"):
        plot_samplers(tmp_path / name, ["euler", "heun"], 4)
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()
    with Image.open(tmp_path / "first.png") as image:
        picture = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(picture, axis=0)) > 50


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"samplers": ["eulre"]}, "'eulre'. Use one of"),
        ({"num_steps": 0}, "num_steps=0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plot_samplers(tmp_path / "unused.png", **settings)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_it_says_how_to_get_it(monkeypatch, tmp_path):
    genuine = builtins.__import__

    def missing(name, *arguments, **settings):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return genuine(name, *arguments, **settings)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ValueError, match=r'pip install "kdiffusion\[plot\]"'):
        plot_samplers(tmp_path / "unused.png")
