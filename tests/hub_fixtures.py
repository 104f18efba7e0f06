"""A hub on this machine, and an environment in which moec knows no other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hub_server import Hub, serve

TOKEN = "hf_SECRETsecretSECRETsecretSECRET"


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A running hub; moec's cache is empty and no token is set."""
    from huggingface_hub import constants, utils

    from moeconsolidate.hub import transfer

    home = tmp_path_factory.mktemp("hub")
    with serve() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.endpoint)
        template = running.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(transfer, "FIRST_PAUSE_S", 0.001)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
            monkeypatch.delenv(name, raising=False)
        yield running
        utils.close_session()


@pytest.fixture
def cache(hub: Hub) -> Path:
    """Where moec keeps what it downloads."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)
