"""A model whose weights are about to be loaded is built at once, and the memory is not touched.

    python tests/acceptance/building.py

All four networks of SD 1.5 at full size; KerasCV took 21 to 43 seconds for them. Seconds are of
the processor and the best of five, so that what else the machine does is hardly counted.
"""

import sys
import time

import keras
import numpy as np

from kdiffusion.records import fields
from kdiffusion.weights.variables import MODELS

BAR = 3.0  # processor seconds, all four together


def main():
    keras.layers.Dense(1).build((None, 1))  # the backend's own start-up is not the model's
    seconds, models = {}, {}
    for kind, model in MODELS.items():
        times = []
        for _ in range(5):
            start = time.process_time()
            models[kind] = model(initialize=False)
            times.append(time.process_time() - start)
        seconds[kind] = min(times)
        print(f"{kind:16s} {models[kind].count_params():12,d} parameters {seconds[kind]:6.2f} s")
    total = sum(seconds.values())
    print(f"{'together':16s} {total:34.2f} s, bar {BAR} s, on {keras.backend.backend()}")
    failures = []
    if total > BAR:
        failures.append(f"building took {total:.2f} s")
    small = fields(models["image_decoder"].architecture) | {"channels": [32, 32]}
    proper = MODELS["image_decoder"](small)
    kernels = [np.asarray(v.value) for v in proper.variables if v.path.endswith("kernel")]
    if not all(1e-3 < kernel.std() < 1.0 for kernel in kernels):
        failures.append("a model built without loading has no proper random kernels")
    for failure in failures:
        print("FAILED:", failure)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
