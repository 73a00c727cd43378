"""Training runs in processes of their own, that tell what they do and can be killed meanwhile.

Processes are forked after the imports, before anything is computed, so one starts within a moment.
What reports import, matplotlib and for TensorBoard TensorFlow, is imported before the forks too.
"""

import contextlib
import os
import random
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

import keras
import matplotlib.figure  # noqa: F401
import numpy as np
import tensorflow  # noqa: F401
from keras import ops

from kdiffusion.models.architectures import DiffusionArchitecture
from kdiffusion.models.diffusion_model import DiffusionModel
from kdiffusion.sampling.schedule import Schedule
from kdiffusion.training import DiffusionTrainer, Loop, LoopSettings, Objective
from kdiffusion.training.loop import checkpoints

sys.path.append(str(Path(__file__).parents[1]))
from tiny_trainer import TinyData, TinyTrainer  # noqa: E402

LIMIT = 120  # seconds without a word after which a process counts as stuck


class Run:
    """A forked process that trains; its words come one a line."""

    def __init__(self, work, *arguments):
        read, write = os.pipe()
        sys.stdout.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # JAX fears forks, which are harmless before its start
            self.pid = os.fork()
        if self.pid == 0:
            os.close(read)
            _child(write, work, arguments)
        os.close(write)
        self._words = os.fdopen(read, "r")
        self.said = []

    def hear(self):
        """The next word, or `None` at the end."""
        word = self._words.readline().strip()
        if word:
            self.said.append(word)
        return word or None

    def kill(self, number=signal.SIGKILL):
        os.kill(self.pid, number)

    def end(self):
        """Hear the rest; returns the exit code, negative for a signal."""
        while self.hear():
            pass
        self._words.close()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _child(write, work, arguments):
    """Run to the end and exit as a script would."""
    code = 1
    signal.alarm(10 * LIMIT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        deterministic()
        work(lambda word: os.write(write, f"{word}\n".encode()), *arguments)
        code = 0
    except SystemExit as error:
        code = error.code
    except BaseException as error:
        os.write(write, f"error {type(error).__name__}: {error}\n".replace("\n", " ").encode())
        if not isinstance(error, ValueError):
            traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


def deterministic():
    """Operations whose results do not depend on which thread was first."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_op_determinism()


class TellingData(TinyData):
    """Says before each step how many are done."""

    def __init__(self, say, data=None):
        super().__init__()
        self._say = say
        self._data = data

    def batch(self, step, size):
        self._say(f"done {step}")
        return (self._data or super()).batch(step, size)


@contextlib.contextmanager
def slow_saves(say, seed):
    """Saves take longer and say how far they are."""
    choose = random.Random(seed)
    save, fsync, rename = checkpoints.save, os.fsync, Path.rename

    def pause(word):
        say(word)
        time.sleep(choose.uniform(0.0, 0.02))

    def slow_save(folder, step, *arguments):
        pause(f"save {step}")
        path = save(folder, step, *arguments)
        say(f"saved {step}")
        return path

    def slow_fsync(descriptor):
        pause("before fsync")
        fsync(descriptor)
        pause("after fsync")

    def slow_rename(path, target):
        pause("before rename")
        result = rename(path, target)
        pause("after rename")
        return result

    checkpoints.save, os.fsync, Path.rename = slow_save, slow_fsync, slow_rename
    try:
        yield
    finally:
        checkpoints.save, os.fsync, Path.rename = save, fsync, rename


def tiny_loop(folder, say, data=None, **settings):
    """A loop with all that makes training hard to repeat."""
    settings = {
        "batch_size": 8,
        "accumulation": 2,
        "clip_norm": 0.3,
        "ema_decay": 0.99,
        "log_every": 1,
        "verbose": False,
        "jit_compile": False,
        **settings,
    }
    optimizer = keras.optimizers.AdamW(keras.optimizers.schedules.CosineDecay(0.01, 100))
    data = data or TellingData(say)
    return Loop(TinyTrainer(), optimizer, data, folder, LoopSettings(**settings))


def diffusion_trainer():
    """A tiny latent diffusion model that attends to contexts, with caption dropout."""
    architecture = DiffusionArchitecture(
        channels=(16, 32),
        layers_per_level=1,
        depths=(1, 0),
        num_heads=(2, 2),
        context_width=8,
        num_groups=8,
    )
    network = DiffusionModel(architecture, name="diffusion_model")
    generator = np.random.default_rng(0)
    for variable in network.variables:
        if variable.path.endswith("kernel"):
            deviation = np.prod(variable.shape[:-1]) ** -0.5
            variable.assign(deviation * generator.standard_normal(variable.shape))
    empty = {"context": np.zeros((5, 8), np.float32)}
    objective = Objective(caption_dropout=0.2)
    return DiffusionTrainer(network, Schedule(), objective=objective, empty=empty)


class Latents:
    """Cached latents and contexts, as a pure function of the step."""

    def batch(self, step, size):
        generator = np.random.default_rng(step)
        mean = generator.standard_normal((size, 8, 8, 4)).astype(np.float32)
        context = generator.standard_normal((size, 5, 8)).astype(np.float32)
        return {"mean": mean, "logvar": mean - 3.0, "context": context}


def arrays(folder):
    """All arrays of the newest checkpoint, by file and name."""
    from weights_conversion import open_safetensors

    saved = checkpoints.newest(folder)
    return saved.step, {
        (path.name, name): array
        for path in sorted(saved.path.glob("*.safetensors"))
        for name, array in open_safetensors(path).items()
    }


def differing(first, second):
    """Count the arrays that are not bit-equal."""
    (step, one), (other_step, two) = first, second
    if step != other_step or one.keys() != two.keys():
        return max(len(one), len(two))
    return sum(one[key].tobytes() != two[key].tobytes() for key in one)


def largest_difference(first, second, name):
    """Of a figure, between two logs of the same steps; infinite if these differ."""
    if [entry["step"] for entry in first] != [entry["step"] for entry in second]:
        return float("inf")
    return max(abs(a[name] - b[name]) for a, b in zip(first, second))


def values(variables):
    return [np.array(ops.convert_to_numpy(variable.value)) for variable in variables]
