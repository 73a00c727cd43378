"""Interrupted and resumed runs, and threads, give byte for byte what an undisturbed run gives.

    python tests/acceptance/resume.py [--steps N] [--threads N] [--requests N]

Every sampler is interrupted after every step by Ctrl-C and by the callback, its state saved to a
file, and resumed. Then threads share one object, with mixed requests.
"""

import argparse
import random
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np

from kdiffusion import Guidance, StableDiffusion
from kdiffusion.sampling.run import State
from kdiffusion.sampling.samplers import SAMPLERS

PROMPTS = ["a red circle", "a blue square", "two words", ""]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--requests", type=int, default=25)
    arguments = parser.parse_args()
    model = StableDiffusion.from_preset("random-tiny", jit_compile=False)
    failures = [*check_resume(model, arguments.steps), *check_threads(model, arguments)]
    for failure in failures:
        print("FAILED:", failure)
    sys.exit(bool(failures))


def check_resume(model, num_steps):
    for sampler in SAMPLERS:
        settings = {"sampler": sampler, "num_steps": num_steps, "seed": 42, "verbose": 0}
        whole = model.text_to_image("a red circle", **settings)
        equal = 0
        for stop in range(1, num_steps + 1):
            state = save_and_load(interrupt(model, stop, settings))
            resumed = model.text_to_image("a red circle", resume=state, **settings)
            equal += np.array_equal(resumed, whole)
        print(f"{sampler:14s} resumed after each of {num_steps} steps: {equal} byte-equal")
        if equal != num_steps:
            yield f"{sampler}: a resumed picture is another one"


def interrupt(model, stop, settings):
    """The state at the step after which Ctrl-C was pressed."""
    states = []

    def press(step):
        if step.step == stop:
            states.append(step.state)
            raise KeyboardInterrupt

    try:
        model.text_to_image("a red circle", callback=press, **settings)
    except KeyboardInterrupt:
        return states[0]
    raise AssertionError("Ctrl-C was swallowed")


def save_and_load(state):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.npz"
        np.savez(path, **state._asdict())
        with np.load(path) as file:
            return State(int(file["row"]), file["registers"])


def check_threads(model, arguments):
    requests = [request(random.Random(i)) for i in range(arguments.threads * arguments.requests)]
    serial = [model.text_to_image(**request) for request in requests]
    parallel = [None] * len(requests)

    def work(first):
        for index in range(first, len(requests), arguments.threads):
            parallel[index] = model.text_to_image(**requests[index])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(arguments.threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    equal = sum(
        result is not None and np.array_equal(result, expected)
        for result, expected in zip(parallel, serial)
    )
    print(f"{arguments.threads} threads, {len(requests)} mixed requests: {equal} byte-equal")
    if equal != len(requests):
        yield "threads that share a model change its pictures"


def request(choose):
    return {
        "prompt": choose.choice(PROMPTS),
        "negative_prompt": choose.choice([None, *PROMPTS]),
        "sampler": choose.choice(sorted(SAMPLERS)),
        "num_steps": choose.randint(2, 6),
        "seed": choose.randrange(2**32),
        "unconditional_guidance_scale": choose.choice([1.0, 3.0, 7.5]),
        "guidance": choose.choice([None, Guidance(rescale=0.7), Guidance(interval=(0.2, 0.8))]),
        "batch_size": choose.choice([1, 2]),
        "height": choose.choice([40, 64]),
        "noise": choose.choice(["cpu", "cuda"]),
        "verbose": 0,
    }


if __name__ == "__main__":
    main()
