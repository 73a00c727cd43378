"""Models opened from the hub."""

import warnings

import hub_server
import pytest
from hub_server import REPOSITORY

from kdiffusion import open_model

pytestmark = pytest.mark.backend


def test_a_preset_is_opened_once(connect, tiny, tmp_path):
    tiny.save(tmp_path / "model")
    paths = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    files = {path.relative_to(tmp_path / "model").as_posix(): path.read_bytes() for path in paths}
    with hub_server.serving(files) as server, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the size of the download is told
        connect(server.address)
        model = open_model(f"hf://{REPOSITORY}")
        assert model.default_sampling[0] == "ddim"
        assert model.tokenizer and model.text_encoder and model.diffusion_model
        # huggingface_hub may ask for more than models.
        assert len([name for name in server.asked("api") if "/models/" in name]) == 1
        asked = server.asked("resolve")
        assert len(asked) == len(set(asked))
