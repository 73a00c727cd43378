"""Calls that mypy checks: a wrong setting is an error, so an ignored error that is none fails."""

from kdiffusion import LatentDiffusion, StableDiffusion


def calls(model: StableDiffusion, other: LatentDiffusion) -> None:
    """Call methods with settings of the right and of the wrong names and types."""
    model.text_to_image("a cat", 4, sampler="ddim")  # type: ignore[arg-type]
    model.text_to_image("a cat", num_steps=4, sampler="ddim", height=512)
    model.text_to_image("a cat", samplr="ddim")  # type: ignore[call-arg]
    model.inpaint("a.png", "b.png", "a cat", height="512")  # type: ignore[arg-type]
    other.generate_image(label=3, seed=1, spacing="trailing")
    other.generate_image(label=3, samplr="ddim")  # type: ignore[call-arg]
