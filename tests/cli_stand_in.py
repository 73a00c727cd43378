"""A stand-in for the model behind the command line, and what the tests of it share."""

from pathlib import Path

import numpy as np

from kdiffusion import Sampler, Spacing, cli


class StandIn:
    """Draws its seeds; remembers what it was asked."""

    error: BaseException | None = None
    asked: dict = {}
    steps: list = []
    default_sampling = "ddim", Spacing()

    @classmethod
    def from_preset(cls, preset, **settings):
        cls.asked = {"preset": preset, **settings}
        return cls()

    def text_to_image(self, prompt, *, seed, batch_size, height, width, callback, **settings):
        type(self).asked.update(settings, prompt=prompt, seed=seed, batch_size=batch_size)
        print("progress")
        for step in self.steps if callback else []:
            callback(step)
        if self.error:
            raise self.error
        shape = (batch_size, height or 16, width or 24, 3)
        return np.broadcast_to(np.arange(batch_size, dtype=np.uint8)[:, None, None, None], shape)

    def image_to_image(self, image, prompt, strength, **settings):
        type(self).asked.update(task="image_to_image", image=image, strength=strength)
        return self.text_to_image(prompt, **settings)

    def inpaint(self, image, mask, prompt, strength, **settings):
        type(self).asked.update(task="inpaint", image=image, mask=mask, strength=strength)
        return self.text_to_image(prompt, **settings)


class Step:
    """The state after a step, as far as the command line asks."""

    def __init__(self, level, count=1):
        self.preview = np.full((count, 8, 12, 3), level, np.uint8)


def chosen_sampling(arguments, defaults):
    sampler = Sampler(arguments.sampler or "ddim", arguments.eta, arguments.order)
    return sampler, Spacing.parse(arguments.spacing)


def generate(*arguments):
    return cli.main(["generate", *arguments])


def files():
    return sorted(path.name for path in Path().iterdir())
