"""Tensor files that lie, handed in with a checkpoint and inside a pack."""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hostile.attacks import Bounded, entries, forge, one_line
from hostile.conftest import Refused

pytestmark = pytest.mark.timeout(30)

Header = dict[str, Any]
Spoil = Callable[[bytes], bytes]


def take(raw: bytes) -> tuple[Header, bytes]:
    """A file's header, tensors in the order of their bytes, and its data."""
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__")
    ordered = sorted(header.items(), key=lambda item: item[1]["data_offsets"][0])
    return dict(ordered), raw[8 + length :]


def put(header: Header | str | bytes, data: bytes) -> bytes:
    if isinstance(header, dict):
        header = json.dumps(header)
    if isinstance(header, str):
        header = header.encode()
    return len(header).to_bytes(8, "little") + header + data


def length(value: int) -> Spoil:
    return lambda raw: value.to_bytes(8, "little") + raw[8:]


def text(edit: Callable[[str], str | bytes]) -> Spoil:
    """Change the text of the header, and the length with it."""

    def spoil(raw: bytes) -> bytes:
        header, data = take(raw)
        return put(edit(json.dumps(header)), data)

    return spoil


def prefix(extra: str) -> Spoil:
    """Add something in front of the first tensor."""
    return text(lambda header: "{" + extra + ", " + header[1:])


def first(**changes: object) -> Spoil:
    """Change fields of the first tensor; `...` removes one."""

    def spoil(raw: bytes) -> bytes:
        header, data = take(raw)
        entry = next(iter(header.values()))
        entry.update(changes)
        for key in [key for key, value in entry.items() if value is ...]:
            del entry[key]
        return put(header, data)

    return spoil


def rename(name: str) -> Spoil:
    def spoil(raw: bytes) -> bytes:
        header, data = take(raw)
        old = next(iter(header))
        return put({name: header.pop(old), **header}, data)

    return spoil


def shift(from_idx: int, by: int) -> Spoil:
    """Move the tensors from one on, and the end of the file, by some bytes."""

    def spoil(raw: bytes) -> bytes:
        header, data = take(raw)
        for entry in list(header.values())[from_idx:]:
            entry["data_offsets"] = [offset + by for offset in entry["data_offsets"]]
        return put(header, data + bytes(by) if by > 0 else data[:by])

    return spoil


def last_is_longer(raw: bytes) -> bytes:
    header, data = take(raw)
    *_, entry = header.values()
    start, stop = entry["data_offsets"]
    # Two bytes a weight: twice as many weights as there are bytes for.
    entry.update(shape=[stop - start], data_offsets=[start, start + 2 * (stop - start)])
    return put(header, data)


def flattened(raw: bytes) -> bytes:
    header, data = take(raw)
    entry = max(header.values(), key=lambda entry: len(entry["shape"]))
    entry["shape"] = [math.prod(entry["shape"])]
    return put(header, data)


def twice(raw: bytes) -> bytes:
    header, data = take(raw)
    name, entry = next(iter(header.items()))
    return put("{" + f"{json.dumps(name)}: {json.dumps(entry)}, " + json.dumps(header)[1:], data)


def many(number: int, name_characters: int) -> Spoil:
    def spoil(raw: bytes) -> bytes:
        entry = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
        names = (f"{idx:0{name_characters}}" for idx in range(number))
        return put("{" + ",".join(f'"{name}":{entry}' for name in names) + "}", b"")

    return spoil


def zipped(_raw: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02.")
    return file.getvalue()


EMPTY = '{"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}'

CASES: dict[str, tuple[Spoil, str]] = {
    "01-empty-file": (lambda _: b"", "0 bytes is too short"),
    "02-seven-bytes": (lambda raw: raw[:7], "7 bytes is too short"),
    "03-header-length-beyond-file": (lambda raw: length(len(raw) - 7)(raw), "exceeds the file's"),
    "04-header-length-1e8+1": (length(10**8 + 1), "header length 100000001"),
    "05-header-length-2^64-1": (length(2**64 - 1), "header length 18446744073709551615"),
    "06-header-length-0": (length(0), "header length 0 is outside"),
    "07-not-utf8": (text(lambda h: h.encode()[:-1] + b', "\xff": 1}'), "not UTF-8 at byte"),
    "08-truncated-json": (text(lambda h: h[:-1]), "not valid JSON"),
    "08-truncated-json-in-a-string": (text(lambda h: h[:5]), "not valid JSON"),
    "09-array": (text(lambda h: f"[{h}]"), "does not start with"),
    "09-null": (text(lambda _: "null"), "does not start with"),
    "09-scalar": (text(lambda _: "42"), "does not start with"),
    "10-byte-order-mark": (text(lambda h: "\ufeff" + h), "does not start with"),
    "11-nul-padding": (text(lambda h: h + "\0" * 8), "not valid JSON: Extra data"),
    "12-two-documents": (text(lambda h: h + h), "not valid JSON: Extra data"),
    "13-duplicate-tensor": (twice, "duplicate key"),
    "14-duplicate-metadata": (
        prefix('"__metadata__": {}, "__metadata__": {}'),
        "duplicate key '__metadata__'",
    ),
    "15-duplicate-key-in-metadata": (
        prefix('"__metadata__": {"a": "1", "a": "2"}'),
        "duplicate key 'a'",
    ),
    "16-unknown-inner-field": (first(strides=[1]), "unknown field 'strides'"),
    "17-no-dtype": (first(dtype=...), "field 'dtype' is missing"),
    "17-no-shape": (first(shape=...), "field 'shape' is missing"),
    "17-no-offsets": (first(data_offsets=...), "field 'data_offsets' is missing"),
    "17-entry-is-null": (prefix('"x": null'), "x: must be a JSON object, not null"),
    "18-unknown-dtype": (first(dtype="BF17"), "unknown dtype 'BF17'"),
    "18-lower-case-dtype": (first(dtype="bf16"), "unknown dtype 'bf16'"),
    "18-dtype-is-a-number": (first(dtype=16), "'dtype' must be a string"),
    "19-metadata-number": (prefix('"__metadata__": {"a": 1}'), "'a' must be a string"),
    "19-metadata-nested": (prefix('"__metadata__": {"a": {}}'), "'a' must be a string"),
    "19-metadata-list": (prefix('"__metadata__": []'), "__metadata__: must be a JSON object"),
    "20-negative-shape": (first(shape=[-1]), "'shape' holds -1"),
    "20-float-shape": (first(shape=[16.0]), "'shape' holds 16.0"),
    "20-string-shape": (first(shape=["16"]), "'shape' holds '16'"),
    "20-boolean-shape": (first(shape=[True]), "'shape' holds True"),
    "20-shape-is-a-number": (first(shape=16), "'shape' must be a list"),
    "20-negative-offset": (first(data_offsets=[-2, 0]), "'data_offsets' holds -2"),
    "20-float-offset": (first(data_offsets=[0.0, 2]), "'data_offsets' holds 0.0"),
    "20-string-offset": (first(data_offsets=["0", 2]), "'data_offsets' holds '0'"),
    "21-one-offset": (first(data_offsets=[0]), "data_offsets [0] are not a start and an end"),
    "21-three-offsets": (first(data_offsets=[0, 1, 2]), "data_offsets [0, 1, 2] are not"),
    "22-end-before-begin": (first(data_offsets=[2, 0]), "data_offsets [2, 0] are not"),
    "23-past-the-end": (last_is_longer, "truncated: the header describes"),
    "23-past-the-end-by-a-page": (
        prefix('"x": {"dtype": "U8", "shape": [4096], "data_offsets": [1000000, 1004096]}'),
        "x: data_offsets 1000000 leaves a hole",
    ),
    "24-first-offset-not-0": (shift(0, 2), "data_offsets 2 leaves a hole"),
    "25-hole": (shift(1, 2), "leaves a hole"),
    "26-overlap": (shift(1, -2), "overlaps another tensor"),
    "27-trailing-byte": (lambda raw: raw + b"\0", "followed by stray bytes"),
    "28-truncated-by-a-byte": (lambda raw: raw[:-1], "truncated: the header describes"),
    "29-shape-and-bytes-differ": (first(shape=[3]), "shape [3] of BF16 needs 6 bytes"),
    "29-shape-nobody-asked-for": (flattened, ": shape ["),
    "30-product-beyond-64-bits": (first(shape=[2**40, 2**40]), "needs 2417851639229258349412352"),
    "30-offset-beyond-64-bits": (first(data_offsets=[0, 2**64]), "holds 18446744073709551616"),
    "30-number-of-5000-digits": (prefix('"x": ' + "9" * 5000), "not valid JSON"),
    "31-nothing-times-2^62": (first(shape=[0, 2**62]), "'shape' holds 4611686018427387904"),
    "32-rank-100": (first(shape=[1] * 100), "rank 100 is more than"),
    "33-name-empty": (rename(""), "tensor name '' is not allowed"),
    "33-name-with-nul": (rename("a\0b"), r"tensor name 'a\x00b' is not allowed"),
    "33-name-of-1-MB": (rename("a" * 2**20), "tensor name 'aaaa"),
    "33-name-that-climbs": (rename("../a"), "tensor name '../a' is not allowed"),
    "34-nested-10000-deep": (prefix('"x": ' + '{"x":' * 10_000 + "1" + "}" * 10_000), "too deep"),
    "35-lone-surrogate-in-a-name": (prefix(rf'"\ud800": {EMPTY}'), r"tensor name '\ud800' is not"),
    "35-lone-surrogate-in-metadata": (
        prefix(r'"__metadata__": {"a": "\ud800"}'),
        "field 'a' holds a lone surrogate",
    ),
    "36-header-of-17-MB": (many(300_000, 6), "header length"),
    "36-100001-tensors": (many(100_001, 1), "100001 tensors, more than 100000"),
    "37-lfs-pointer": (
        lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
        "a Git LFS pointer",
    ),
    "37-gguf": (lambda _: b"GGUF\x03\0\0\0" + bytes(64), "a GGUF file"),
    "37-html": (lambda _: b"<!DOCTYPE html><html><body>Not found</body></html>", "an HTML page"),
    "37-html-lower-case": (lambda _: b"<!doctype html><title>Sign in</title>", "an HTML page"),
    "37-html-after-blank-lines": (lambda _: b"\n\n  <HTML><body>" + bytes(64), "an HTML page"),
    "38-zip": (zipped, "a zip archive"),
    "38-pickle": (lambda _: b"\x80\x02}q\x00." + bytes(64), "a Python pickle"),
    "38-newer-pickle": (lambda _: b"\x80\x04\x95" + bytes(64), "a Python pickle"),
}


@pytest.mark.parametrize("case", CASES)
def test_in_a_checkpoint(case: str, not_consolidated: Refused, models: Path) -> None:
    spoil, complaint = CASES[case]
    path = models / "b" / "model.safetensors"
    path.write_bytes(spoil(path.read_bytes()))
    not_consolidated([f"{path}: ", complaint])


@pytest.mark.parametrize("case", CASES)
def test_in_a_pack(case: str, refused: Refused, bad_pack: Path) -> None:
    """The digest in the manifest is the bad file's own: the header must be seen through."""
    spoil, complaint = CASES[case]
    path = bad_pack / "variants" / "b.safetensors"
    forge(bad_pack, "variants/b.safetensors", spoil(path.read_bytes()))
    refused(5, [f"{path}: ", complaint], "inspect", bad_pack)


def test_claims_cost_no_memory(bounded: Bounded, models: Path, tmp_path: Path) -> None:
    """Sizes are compared with the file before anything is taken for them."""
    for case in ("04-header-length-1e8+1", "30-product-beyond-64-bits", "36-header-of-17-MB"):
        folder = models / case
        folder.mkdir()
        for file in (models / "b").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        path = folder / "model.safetensors"
        spoil, complaint = CASES[case]
        path.write_bytes(spoil(path.read_bytes()))
        if case.startswith("04"):
            with path.open("r+b") as file_:  # as long as it says, and full of holes
                file_.truncate(2**30)
        call = ["consolidate", models / "a", f"b={folder}", "-o", tmp_path / "out", "-q"]
        code, err = bounded(64 * 2**20, *call)
        assert code == 3
        assert complaint in one_line(err)
    assert entries(tmp_path) == []
