"""Compiled kernels kept on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from moeruntime.kernels.image_cache import FOLDER_VARIABLE, ImageCache


def test_an_image_is_found_again_under_its_key(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there"
    ImageCache(folder).put("key", b"image")
    assert ImageCache(folder).get("key") == b"image"
    assert ImageCache(folder).get("another") is None
    assert len(list(folder.iterdir())) == 1, "nothing else is left behind"


@pytest.mark.parametrize(
    "spoil", [lambda b: b[:-1], lambda b: b[:32], lambda b: b"", lambda b: b[::-1]]
)
def test_a_spoilt_file_is_as_good_as_none(tmp_path: Path, spoil) -> None:  # type: ignore[no-untyped-def]
    images = ImageCache(tmp_path)
    images.put("key", b"image")
    (file,) = tmp_path.iterdir()
    file.write_bytes(spoil(file.read_bytes()))
    assert images.get("key") is None
    images.put("key", b"image")
    assert images.get("key") == b"image"


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    images = ImageCache(tmp_path / "file" / "folder")
    images.put("key", b"image")
    assert images.get("key") is None


def test_the_folder_is_the_users_unless_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    ImageCache().put("key", b"image")
    assert list((tmp_path / "caches" / "moec" / "kernels").iterdir())
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "named"))
    assert ImageCache().get("key") is None
    ImageCache().put("key", b"image")
    assert list((tmp_path / "named").iterdir())


def test_without_a_home_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", no_home)
    images = ImageCache()
    images.put("key", b"image")
    assert images.get("key") is None
