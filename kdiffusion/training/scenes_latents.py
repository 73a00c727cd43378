"""Latents of scenes, computed once and kept on the disk, for training without an encoder."""

from pathlib import Path

import numpy as np
from keras import ops

from kdiffusion import backend
from kdiffusion.generation import Program
from kdiffusion.models.image_encoder import ImageEncoder
from kdiffusion.training.data import Arrays
from kdiffusion.training.scenes_data import SceneData
from weights_conversion import staged_file

CHUNK = 256  # scenes of a file
_BATCH = 32


class SceneLatents:
    """Batches of the latents and captions of the first scenes of a seed, in a new order each epoch.

    Mean and log-variance are kept in float16, so that training still draws from them. Files that
    are there already are not made again; one folder is for one encoder and one `SceneData`.

    Args:
        data: `SceneData`.
        image_encoder: `ImageEncoder`.
        folder: path of the folder to keep them in, made if it is missing.
        count: int, how many scenes, a multiple of `CHUNK`.

    Raises:
        ValueError: `count` is no multiple of `CHUNK`.

    Example:

    ```python
    latents = SceneLatents(SceneData(), image_encoder, "latents", 65_536)
    latents.batch(step=0, size=8)["mean"].shape  # (8, 16, 16, 4) where pictures are halved twice
    ```
    """

    def __init__(self, data: SceneData, image_encoder: ImageEncoder, folder: Path, count: int):
        if count < CHUNK or count % CHUNK:
            raise ValueError(f"`count` must be a multiple of {CHUNK}. Received: {count}")
        self._seed = data.seed
        self._encode = Program(_encode_picture, backend.use_jit("auto"))
        folder.mkdir(parents=True, exist_ok=True)
        chunks = []
        for number in range(count // CHUNK):
            path = folder / f"{number:05d}.npz"
            if not path.exists():
                self._write(path, data.batch(number, CHUNK), image_encoder)
            with np.load(path) as arrays:
                chunks.append(dict(arrays))
        self._arrays = {
            name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]
        }
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def batch(self, step: int, size: int) -> Arrays:
        """The batch of a step; a pure function of its arguments.

        Args:
            step: int, from 0.
            size: int, samples of a batch.

        Returns:
            Dictionary of `mean` and `logvar`, (size, height, width, channels) float32, `tokens`,
            (size, length) int32, `index`, (size,) int32, and `sample`, (size,) int64, the numbers
            of the scenes.
        """
        count = len(self._arrays["tokens"])
        places = [divmod(place, count) for place in range(step * size, (step + 1) * size)]
        scenes = np.array([self._at(epoch)[place] for epoch, place in places])
        rows = {name: array[scenes] for name, array in self._arrays.items()}
        return {
            "mean": rows["mean"].astype(np.float32),
            "logvar": rows["logvar"].astype(np.float32),
            "tokens": rows["tokens"],
            "index": np.arange(size, dtype=np.int32),
            "sample": scenes,
        }

    def _at(self, epoch):
        """The order of an epoch."""
        if self._order[0] != epoch:
            key = np.array([self._seed, epoch], np.uint64)
            raw = np.random.Philox(key=key).random_raw(len(self._arrays["tokens"]))
            self._order = epoch, np.argsort(raw, kind="stable")
        return self._order[1]

    def _write(self, path, batch, image_encoder):
        parts = []
        for start in range(0, CHUNK, _BATCH):
            pictures = ops.convert_to_tensor(batch["images"][start : start + _BATCH])
            moments = self._encode(image_encoder, pictures)
            parts.append([ops.convert_to_numpy(moments[name]) for name in ("mean", "logvar")])
        mean, logvar = (np.concatenate(part).astype(np.float16) for part in zip(*parts))
        with staged_file(path) as stage, open(stage, "wb") as file:
            np.savez(file, mean=mean, logvar=logvar, tokens=batch["tokens"])


def _encode_picture(model, pictures):
    return model(pictures)
