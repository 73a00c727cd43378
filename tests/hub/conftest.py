"""A hub that huggingface_hub asks instead of the real one."""

import pytest

from kdiffusion.weights import hub_errors


@pytest.fixture
def connect(monkeypatch, tmp_path):
    """Set huggingface_hub up, which reads its environment when it is imported."""
    from huggingface_hub import constants

    def set_up(address, offline=False):
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 60)
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 60)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)

    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setattr(hub_errors.time, "sleep", lambda seconds: None)
    return set_up
