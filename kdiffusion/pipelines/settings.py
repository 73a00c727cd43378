"""The settings of a call, checked, and as one value for each image of a batch."""

from __future__ import annotations

import functools
import inspect
import math
import secrets
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ParamSpec, TypedDict, TypeVar, get_type_hints

import keras
import numpy as np

from kdiffusion.sampling.guidance import Guidance
from kdiffusion.sampling.noise import NoiseStream, noise_stream
from kdiffusion.sampling.run import State, Step
from kdiffusion.sampling.samplers import SAMPLERS, Sampler, default_spacing, make_table
from kdiffusion.sampling.schedule import Schedule
from kdiffusion.sampling.spacing import Spacing
from kdiffusion.sampling.table import Table


class DrawSettings(TypedDict, total=False):
    """The keyword settings that all generating methods share.

    A new setting is a row here, which says its type and what it does, and a field of `Settings`,
    which says its default.

    Args:
        sampler: name in `SAMPLERS`, `Sampler`, or `None` for the checkpoint's own; a list has one
            for each image.
        spacing: `"leading"`, `"trailing"`, `"linspace"`, `"karras"`, `"exponential"`, `"beta"`, or
            a pair such as `"leading+karras"`; `None` for the checkpoint's own.
        height: int, in pixels, a multiple of the model's downsampling factor (8 for Stable
            Diffusion); `None` for that of the given image if there is one, else `img_height`.
        width: int, in pixels, likewise.
        guidance: `Guidance`, or `None` for plain classifier-free guidance.
        callback: function called with a `Step` after each step; if it returns `False`, sampling
            stops there and the current estimate is decoded.
        verbose: int, 0 for silence, 1 for a progress bar.
        noise: `"cpu"`, the noise that PyTorch draws on a CPU (diffusers, ComfyUI), or `"cuda"`,
            that which it draws on a GPU (AUTOMATIC1111).
        resume: `Step.state` of an interrupted call with the same settings; the result equals that
            of the uninterrupted call.
    """

    sampler: str | Sampler | Sequence[str | Sampler] | None
    spacing: str | Spacing | None
    height: int | None
    width: int | None
    guidance: Guidance | None
    callback: Callable[[Step], Any] | None
    verbose: int
    noise: str
    resume: State | None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a call; see `DrawSettings` and `StableDiffusion.text_to_image`."""

    num_steps: int | Sequence[int] = 50
    guidance_scale: float | Sequence[float] = 7.5
    seed: int | Sequence[int] | None = None
    sampler: str | Sampler | Sequence[str | Sampler] | None = None
    spacing: str | Spacing | None = None
    height: int | None = None
    width: int | None = None
    guidance: Guidance | None = None
    callback: Callable[[Step], Any] | None = None
    verbose: int = 1
    noise: str = "cpu"
    resume: State | None = None

    def tables(
        self,
        count: int,
        schedule: Schedule,
        defaults: tuple[str, Spacing],
        strength: float = 1.0,
    ) -> list[Table]:
        """Make the sampler table of each image.

        Args:
            count: int, images of the batch.
            schedule: the network's schedule.
            defaults: the checkpoint's own sampler and spacing.
            strength: float, see `make_table`.
        """
        made: dict[Any, Table] = {}
        keys = list(zip(self._each("sampler", count), self._each("num_steps", count)))
        for key in keys:
            if key not in made:
                sampler, spacing = resolve_sampling(key[0], self.spacing, defaults)
                made[key] = make_table(sampler, schedule, key[1], spacing, strength)
        return [made[key] for key in keys]

    def scales(self, count: int) -> np.ndarray:
        """Return the guidance scale of each image, (count,) float64."""
        scales = self._each("guidance_scale", count)
        if not all(_is_number(scale) and math.isfinite(scale) for scale in scales):
            raise ValueError(
                "`unconditional_guidance_scale` must be a finite number. Received: "
                f"unconditional_guidance_scale={self.guidance_scale!r}. Usual values are 5 to 10; "
                "1 is off."
            )
        return np.array(scales, np.float64)

    def is_guided(self, count: int) -> bool:
        """Tell if any image of the batch is guided; a scale of at most 1 is off."""
        return bool(self.scales(count).max() > 1.0)

    def streams(self, count: int) -> list[NoiseStream]:
        """Return the noise stream of each image: that of `seed + i`, or of its own seed."""
        seed = secrets.randbelow(2**32) if self.seed is None else self.seed
        if isinstance(seed, (list, tuple, np.ndarray)):
            seeds = one_each("seed", seed, count)
        elif isinstance(seed, (int, np.integer)) and not isinstance(seed, bool):
            seeds = [seed + i for i in range(count)]
        else:
            raise ValueError(
                f"`seed` must be a whole number, or a list of them. Received: seed={seed!r}"
            )
        return [noise_stream(seed, self.noise) for seed in seeds]

    def watcher(self) -> Callable[[Step], Any] | None:
        """Return one function for the progress bar and the callback; `None` without both."""
        if not self.verbose:
            return self.callback
        bar: list[Any] = []

        def watch(step):
            if not bar:
                bar.append(keras.utils.Progbar(step.num_steps, verbose=self.verbose))
            bar[0].update(step.step)
            return self.callback(step) if self.callback else None

        return watch

    def _each(self, name, count):
        value = getattr(self, name)
        if isinstance(value, (list, tuple, np.ndarray)):
            return one_each(name, value, count)
        return [value] * count


Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def shares_settings(method: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Show each of `DrawSettings` in the signature and the docstring of a method.

    Defaults are those of `Settings`. So `help`, notebooks and editors list what the method takes
    as `**settings: Unpack[DrawSettings]`, and a wrong name is refused with the known ones.

    Args:
        method: method whose last parameter is `**settings`, with a Google-style docstring.

    Returns:
        The method.
    """
    hints, defaults = get_type_hints(DrawSettings), {f.name: f.default for f in fields(Settings)}
    own = inspect.signature(method)
    keyword = inspect.Parameter.KEYWORD_ONLY
    shared = [
        inspect.Parameter(name, keyword, default=defaults[name], annotation=hint)
        for name, hint in hints.items()
    ]
    signature = own.replace(parameters=[*list(own.parameters.values())[:-1], *shared])

    @functools.wraps(method)
    def checked(*arguments: Parameters.args, **keywords: Parameters.kwargs) -> Result:
        for name in keywords:
            if name not in signature.parameters:
                raise TypeError(
                    f"{method.__name__}() has no setting {name!r}. It takes: "
                    f"{', '.join(list(signature.parameters)[1:])}."
                )
        return method(*arguments, **keywords)

    vars(checked)["__signature__"] = signature
    checked.__doc__ = _with_shared_arguments(method.__doc__ or "")
    return checked


def _with_shared_arguments(doc: str) -> str:
    """Put the Args of `DrawSettings` behind a docstring's own."""
    shared = inspect.cleandoc(DrawSettings.__doc__ or "").partition("Args:\n")[2]
    indented = "".join(f"        {line}\n" for line in shared.rstrip().splitlines())
    return doc.replace("\n\n        Returns:", f"\n{indented}\n        Returns:", 1)


def resolve_sampling(
    sampler: str | Sampler | None, spacing: str | Spacing | None, defaults: tuple[str, Spacing]
) -> tuple[Sampler, Spacing]:
    """Return the sampler and the spacing to use, the checkpoint's where none is chosen.

    A checkpoint's sampler that is not available is replaced by ddim, with a warning. A
    checkpoint's sigma spacing is left out for a sampler that takes none; a chosen one is not.

    Args:
        sampler: name in `SAMPLERS`, `Sampler`, or `None` for the checkpoint's own.
        spacing: text for `Spacing.parse`, `Spacing`, or `None` for the checkpoint's own.
        defaults: the checkpoint's own sampler and spacing.

    Returns:
        `Sampler` and `Spacing`.

    Raises:
        ValueError: For an unknown name.

    Example:

    >>> resolve_sampling(None, "trailing", ("euler", Spacing(sigmas="karras")))[1].sigmas is None
    True
    """
    own_sampler, own_spacing = defaults
    if sampler is None and own_sampler not in SAMPLERS:
        warnings.warn(
            f"The checkpoint's scheduler names the sampler {own_sampler!r}, which is not "
            "available; 'ddim' draws in its place.",
            stacklevel=5,
        )
        own_sampler = "ddim"
    sampler = own_sampler if sampler is None else sampler
    if not isinstance(sampler, Sampler):
        sampler = Sampler(sampler)
    if spacing is None:
        spacing = default_spacing(sampler, own_spacing)
    return sampler, Spacing.parse(spacing, own_spacing)


def one_each(name: str, values: Sequence | np.ndarray, count: int) -> list:
    """Return the values as a list, if there is one for each of `count` images.

    Raises:
        ValueError: If there are more or fewer, or it is no list.
    """
    if not isinstance(values, (list, tuple, np.ndarray)):
        raise ValueError(
            f"`{name}` must be one value of its kind, or a list of {count}, one for each image. "
            f"Received: {name}={values!r}"
        )
    if len(values) != count:
        raise ValueError(
            f"`{name}` must be one value, or a list of {count}, one for each image. "
            f"Received: {len(values)} values"
        )
    return list(values)


def check_count(name: str, value: Any) -> int:
    """Return a positive whole number as an int.

    Raises:
        ValueError: If it is none.
    """
    if not _is_number(value) or value != int(value) or value < 1:
        raise ValueError(f"`{name}` must be a positive whole number. Received: {name}={value!r}")
    return int(value)


def _is_number(value):
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
