"""Tables of names: places in three module trees, kinds of layers, and rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

DIALECTS = ("compvis", "diffusers")

Table = tuple[tuple[str, str, str, str], ...]  # kdiffusion, CompVis, diffusers, layer


class Stored(NamedTuple):
    """A tensor in a file: its name, and its layout (see `layouts`)."""

    name: str
    layout: str


class Row(NamedTuple):
    """One variable: its path and Keras shape in kdiffusion, and where each dialect stores it."""

    kdiffusion: str
    shape: tuple[int, ...]
    compvis: Stored
    diffusers: Stored


class Place(NamedTuple):
    """A spot in the three module trees."""

    kdiffusion: str = ""
    compvis: str = ""
    diffusers: str = ""

    def at(self, kdiffusion: str, compvis: str, diffusers: str) -> Place:
        """Return the spot below this one."""
        return Place(
            "/".join(filter(None, (self.kdiffusion, kdiffusion))),
            ".".join(filter(None, (self.compvis, compvis))),
            ".".join(filter(None, (self.diffusers, diffusers))),
        )


_VARIABLES = {  # kind of layer: its kdiffusion variables, the kernel first
    "norm": ("gamma", "beta"),
    "dense": ("kernel", "bias"),
    "kernel": ("kernel",),
    "pointwise": ("kernel", "bias"),
    "conv1": ("kernel", "bias"),
    "conv3": ("kernel", "bias"),
    "patches": ("kernel",),
    "table": ("",),
    "bare": ("",),
}
_FORMS = {  # form in a file: the end of the tensor's name and its layout, for each variable
    "norm": ((".weight", "keep"), (".bias", "keep")),
    "dense": ((".weight", "dense"), (".bias", "keep")),
    "kernel": ((".weight", "dense"),),
    "pointwise": ((".weight", "pointwise"), (".bias", "keep")),
    "conv1": ((".weight", "conv"), (".bias", "keep")),
    "conv3": ((".weight", "conv"), (".bias", "keep")),
    "patches": ((".weight", "conv"),),  # a convolution without bias; its window comes first
    "table": ((".weight", "keep"),),
    "bare": (("", "keep"),),  # a parameter without a module of its own
    "stack0": (("_weight", "dense[0]"), ("_bias", "keep[0]")),
    "stack1": (("_weight", "dense[1]"), ("_bias", "keep[1]")),
    "stack2": (("_weight", "dense[2]"), ("_bias", "keep[2]")),
}
_WINDOWS = {"conv1": (1, 1), "conv3": (3, 3)}


def layers(place: Place, table: Table, **sizes: Any) -> Iterator[Row]:
    """Yield the rows of a table's layers; `sizes` gives the words of its last column a value."""
    for *names, layer in table:
        forms, *widths = (sizes.get(word, word) for word in layer.split())
        compvis, _, diffusers = forms.rpartition("|")
        yield from _layer(place.at(*names), compvis or diffusers, diffusers, widths)


def _layer(place: Place, compvis: str, diffusers: str, widths: list[int]) -> Iterator[Row]:
    kernel_shape = (*_WINDOWS.get(diffusers, ()), *widths)
    files = zip(_FORMS[compvis], _FORMS[diffusers])
    for variable, (in_compvis, in_diffusers) in zip(_VARIABLES[diffusers], files):
        yield Row(
            "/".join(filter(None, (place.kdiffusion, variable))),
            kernel_shape if variable in ("kernel", "") else (widths[-1],),
            Stored(place.compvis + in_compvis[0], in_compvis[1]),
            Stored(place.diffusers + in_diffusers[0], in_diffusers[1]),
        )


def resnet(place: Place, table: Table, inputs: int, outputs: int, **sizes: int) -> Iterator[Row]:
    """Yield a resnet's rows; the shortcut, last in its table, is there if the width changes."""
    table = table if inputs != outputs else table[:-1]
    return layers(place, table, inputs=inputs, outputs=outputs, **sizes)
