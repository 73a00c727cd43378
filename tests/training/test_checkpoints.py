"""Checkpoints of runs: whole or not there, and believed only when every byte is as written."""

import json
import shutil

import keras
import numpy as np
import pytest
from keras import ops
from tiny_trainer import TinyTrainer

from kdiffusion.training.loop import checkpoints
from weights_conversion import CheckpointError, CheckpointMismatch, CorruptCheckpoint


def variables(seed):
    generator = np.random.default_rng(seed)
    return {
        "weights": {
            "network/kernel": keras.Variable(generator.normal(size=(4, 5)).astype("float32")),
            "network/half": keras.Variable(np.ones((3,), "float32"), dtype="bfloat16"),
        },
        "optimizers": {"model/iterations": keras.Variable(seed, dtype="int32")},
    }


def values(files):
    return [
        ops.convert_to_numpy(ops.cast(v.value, "float32"))
        for f in files.values()
        for v in f.values()
    ]


@pytest.fixture
def folder(tmp_path):
    for step in (10, 20, 30):
        checkpoints.save(tmp_path, step, variables(step), {"note": [step]})
    return tmp_path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_is_found_and_restored(folder):
    saved = checkpoints.newest(folder)
    assert (saved.step, saved.notes) == (30, {"note": [30]})
    restored = variables(1)
    restored["optimizers"]["model/iterations"] = keras.Variable(0, dtype="int16")
    checkpoints.restore(saved, restored)
    for value, expected in zip(values(restored), values(variables(30)), strict=True):
        np.testing.assert_array_equal(value, expected)
    assert checkpoints.newest(folder / "nowhere") is None


def damage(path, kind):
    """Change one thing about a checkpoint."""
    file, _, what = kind.partition(" ")
    file = path / file
    content = bytearray(file.read_bytes())
    if what == "missing":
        file.unlink()
        return
    if what == "cut":
        del content[-1:]
    elif what == "empty":
        content.clear()
    elif what == "longer":
        content += b"\0"
    else:
        content[int(what) % len(content)] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "kind",
    [
        *(
            f"weights.safetensors {what}"
            for what in ("missing", "cut", "empty", "longer", "0", "-1")
        ),
        *(f"optimizers.safetensors {what}" for what in ("cut", "-1")),
        *(f"manifest.json {what}" for what in ("missing", "cut", "empty", "20", "90", "400", "-4")),
    ],
)
def test_a_damaged_checkpoint_is_set_aside(folder, kind):
    damage(folder / "step-00000030", kind)
    with pytest.warns(UserWarning, match="step-00000030 is damaged.*the one before it is used"):
        assert checkpoints.newest(folder).step == 20
    assert names(folder) == ["damaged-step-00000030", "step-00000010", "step-00000020"]
    checkpoints.save(folder, 30, variables(30), {})
    assert checkpoints.newest(folder).step == 30


def test_a_manifest_belongs_to_its_folder(folder):
    (folder / "step-00000030").rename(folder / "step-00000040")
    with pytest.warns(UserWarning, match="not as it was written"):
        assert checkpoints.newest(folder).step == 20


def test_a_manifest_that_lacks_something_is_damaged(folder):
    path = folder / "step-00000030" / checkpoints.MANIFEST
    for content in ([], {"sha256": ""}, {"sha256": "", "files": 1, "step": 30, "notes": {}}):
        path.write_text(json.dumps(content))
        with pytest.raises(CorruptCheckpoint):
            checkpoints.verify(path.parent)


def test_without_a_whole_one_nothing_begins_anew(folder):
    for path in folder.iterdir():
        damage(path, "weights.safetensors cut")
    before = names(folder)
    with pytest.raises(CorruptCheckpoint, match="None of the 3 checkpoints.*Move them away"):
        checkpoints.newest(folder)
    assert names(folder) == before


def test_only_the_newest_are_kept(folder):
    for step in (99_999_999, 100_000_000):  # in another order as texts
        checkpoints.save(folder, step, variables(1), {})
    checkpoints.prune(folder, 2)
    assert names(folder) == ["step-100000000", "step-99999999"]
    assert checkpoints.newest(folder).step == 100_000_000


def test_leftovers_of_killed_saves_are_removed(folder):
    (folder / ".step-00000040.0123abcd.partial").mkdir()
    (folder / ".step-00000040.0123abcd.partial" / "weights.safetensors").touch()
    checkpoints.remove_leftovers(folder)
    assert names(folder) == ["step-00000010", "step-00000020", "step-00000030"]


def test_nothing_is_left_of_a_save_that_fails(folder, monkeypatch):
    before = names(folder)
    with pytest.raises(CheckpointError, match="exists already"):
        checkpoints.save(folder, 30, variables(1), {})
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="Make room"):
        checkpoints.save(folder, 40, variables(1), {})
    assert names(folder) == before


@pytest.mark.parametrize("change", ["missing", "unknown", "shape", "dtype"])
def test_other_variables_are_refused_whole(folder, change):
    own = variables(1)
    if change == "missing":
        own["optimizers"]["model/more"] = keras.Variable(1.0)
    if change == "unknown":
        del own["weights"]["network/half"]
    if change == "shape":
        own["optimizers"]["model/iterations"] = keras.Variable([1], dtype="int32")
    if change == "dtype":
        own["weights"]["network/half"] = keras.Variable(np.ones((3,), "float32"))
    before = values(own)
    with pytest.raises(CheckpointMismatch, match="1 variables are missing, unknown or of another"):
        checkpoints.restore(checkpoints.newest(folder), own)
    for value, expected in zip(values(own), before, strict=True):
        np.testing.assert_array_equal(value, expected)


def test_names_are_paths_below_their_network():
    model = TinyTrainer()
    model.second = TinyTrainer().network
    model.second.name = "second"
    variables = [model.steps, *model.network.variables, *model.second.variables]
    names = [f"{layer}/{kind}" for layer in ("first", "second") for kind in ("kernel", "bias")]
    assert list(checkpoints.named(model, variables)) == [
        "tiny_trainer/steps",
        *(f"network/{name}" for name in names),
        *(f"second/{name.removeprefix('second/')}" for name in names),
    ]
    optimizers = [keras.optimizers.Adam(name="adam_7"), keras.optimizers.Adam()]
    for optimizer in optimizers:
        optimizer.build(variables[1:2])
    slots = checkpoints.slots(dict(zip("ab", optimizers)))
    assert len(slots) == 8 and "a/iteration" in slots and "b/iteration" in slots
    pairs = [("x", 1), ("y", 2), ("x", 3)]
    assert dict(checkpoints.distinct(pairs)) == {"x": 1, "y": 2, "x#2": 3}


def test_fingerprints_see_names_and_values():
    first = variables(1)["weights"]
    second = {**first, "network/kernel": keras.Variable(first["network/kernel"].value + 1.0)}
    renamed = {"a" + name: variable for name, variable in first.items()}
    prints = {checkpoints.fingerprint(v) for v in (first, second, renamed, dict(first))}
    assert len(prints) == 3
