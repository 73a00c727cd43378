"""Files that PyTorch wrote, read without it: equal, bit for bit."""

import collections

import numpy as np
import pytest
import torch
from corpus.models import FIELDS, KINDS, averaged, tensors, training_leftovers, weights

from weights_conversion import open_checkpoint, open_single_file, open_torch

CONTAINERS = {
    "zip": {},
    "zip, protocol 4": {"pickle_protocol": 4},
    "zip, protocol 5": {"pickle_protocol": 5},
    "legacy": {"_use_new_zipfile_serialization": False},
    "legacy, protocol 4": {"_use_new_zipfile_serialization": False, "pickle_protocol": 4},
}


def states():
    torch.manual_seed(0)
    base = torch.randn(10, 20)
    found = collections.OrderedDict(
        base=base,
        tied=base,
        turned=base.t(),
        part=base[2:5, ::3],
        channels_last=torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        expanded=torch.ones(1).expand(4, 5),
        scalar=torch.tensor(3.5),
        empty=torch.empty(0, 3),
        parameter=torch.nn.Parameter(torch.randn(2, 2)),
    )
    for dtype in ("bfloat16", "float16", "float64", "int64", "int32", "int16", "int8", "uint8"):
        found[dtype] = torch.arange(-3, 4).to(getattr(torch, dtype))
    found["bool"] = torch.tensor([True, False])
    found["complex"] = torch.randn(2, dtype=torch.complex64)
    return found


def check(checkpoint, expected):
    assert set(checkpoint) == set(expected)
    for name, tensor in expected.items():
        array = checkpoint[name]
        tensor = tensor.detach().contiguous()
        assert array.shape == tuple(tensor.shape)
        assert array.dtype.name == str(tensor.dtype).removeprefix("torch.")
        assert array.tobytes() == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("settings", CONTAINERS.values(), ids=CONTAINERS)
def test_every_tensor(tmp_path, settings):
    path = tmp_path / "model.pt"
    torch.save(states(), path, **settings)
    check(open_checkpoint(path), states())


def test_dtypes_of_the_zip_container_only(tmp_path):
    found = {
        name: torch.arange(4).to(getattr(torch, name))
        for name in ("float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64")
    }
    torch.save(found, tmp_path / "model.pt")
    check(open_torch(tmp_path / "model.pt"), found)


@pytest.mark.parametrize("settings", CONTAINERS.values(), ids=CONTAINERS)
def test_training_state(tmp_path, settings):
    layer = torch.nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    state = {
        "epoch": 3,
        "global_step": 875000,
        "state_dict": layer.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [],
        "hyper_parameters": {"size": torch.Size([2, 3]), "when": np.float64(0.5)},
    }
    path = tmp_path / "model.ckpt"
    torch.save(state, path, **settings)
    checkpoint = open_torch(path)
    check(checkpoint, layer.state_dict())
    assert checkpoint.metadata == {"epoch": "3", "global_step": "875000"}


@pytest.mark.parametrize("settings", CONTAINERS.values(), ids=CONTAINERS)
def test_stable_diffusion_with_its_average(tmp_path, settings):
    found = tensors("sd1")
    average = averaged(found)
    every = {name: torch.from_numpy(a) for name, a in (found | average).items()}
    every |= {name: torch.from_numpy(a) for name, a in training_leftovers().items()}
    torch.save({"state_dict": every}, tmp_path / "model.ckpt", **settings)
    model = open_single_file(tmp_path / "model.ckpt", weights="raw")
    for kind, component in KINDS.items():
        arrays = dict(model.arrays(kind))
        expected = weights(kind, FIELDS["sd1"][component])
        assert arrays.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(arrays[name], array)
    arrays = dict(open_single_file(tmp_path / "model.ckpt").arrays("diffusion_model"))
    bias = average["model_ema.diffusion_modelout2bias"]
    np.testing.assert_array_equal(arrays["conv_out/bias"], bias)
