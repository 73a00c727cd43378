"""Requests to TensorFlow and JAX at the start."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kdiffusion.runtime import backend

CHILD = """
import re
from pathlib import Path
from kdiffusion.runtime import backend
from keras import ops

def kilobytes(name):
    status = Path("/proc/self/status").read_text("ascii")
    return int(re.search(rf"{name}:\\s+(\\d+) kB", status)[1])

ops.convert_to_numpy(ops.ones(2))  # the first operation starts threads, which take some too
maps = []
for sizes in ([], [], [2**24, 2**28, 2**27, 2**27], []):
    if backend.name() == "tensorflow":
        import tensorflow as tf

        maps = [tf.raw_ops.Empty(shape=(size,), dtype=tf.uint8) for size in sizes]
    print(kilobytes("VmSize"), kilobytes("VmRSS"))
    backend.reserve_memory()
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read as in Linux")
def test_memory_for_a_decoders_maps_is_reserved_once_and_not_used():
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    numbers = [2**10 * int(number) for number in re.findall(r"\d+", done.stdout)[-8:]]
    sizes, resident = numbers[::2], numbers[1::2]
    if backend.name() == "tensorflow" and not backend.on_accelerator():
        assert sizes[1] - sizes[0] >= 2**29
    # A further region would be 256 MiB or more; threads and their arenas take some of their own.
    assert max(sizes) - sizes[1] < 2**27
    assert max(resident) - resident[0] < 2**26
