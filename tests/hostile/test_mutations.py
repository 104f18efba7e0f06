"""Sound files with random damage: whatever it is, the answer is a MoecError or none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from hostile.attacks import edit_json
from moeconsolidate.checkpoint import Checkpoint
from moeruntime.errors import CheckpointError, MoecError
from moeruntime.pack import Manifest, Pack
from moeruntime.tensorfile import TensorFile

# What parsers stumble over; each lands anywhere, so most of it makes no sense where it is.
FRAGMENTS = (
    b"null", b"true", b"-1", b"0", b"1e999", b"1.5", b'"', b"'", b"{", b"}", b"[", b"]", b",", b":",
    b"\\", b"\\u0000", b"\\ud800", b"\xff", b"\0", b"NaN", b"[]", b"{}", b"[[[[", b'{"a":', b"../",
    b"9" * 30, b"9" * 5000, b"18446744073709551616", b"4611686018427387904", b" " * 100, b"\n",
)  # fmt: skip

Mutation = Callable[[bytes], bytes]
Sound = tuple[Path, Mapping[Path, bytes]]


@st.composite
def mutations(draw: st.DrawFn) -> Mutation:
    """One to four pieces of damage; places are parts of the length, so that they shrink well."""
    steps = draw(
        st.lists(
            st.tuples(
                st.sampled_from(["flip", "truncate", "delete", "repeat", "insert", "replace"]),
                st.floats(0, 1, exclude_max=True),
                st.integers(0, 7),
                st.integers(1, 40),
                st.sampled_from(FRAGMENTS),
            ),
            min_size=1,
            max_size=4,
        )
    )

    def mutate(data: bytes) -> bytes:
        for kind, place, bit, count, fragment in steps:
            at = int(place * len(data))
            if kind == "truncate":
                data = data[:at]
            elif kind == "delete":
                data = data[:at] + data[at + count :]
            elif kind == "repeat":  # a piece of the file, spliced in where it came from
                data = data[:at] + data[max(0, at - count) :]
            elif kind == "insert":
                data = data[:at] + fragment + data[at:]
            elif kind == "replace":
                data = data[:at] + fragment + data[at + len(fragment) :]
            elif data:
                data = data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
        return data

    return mutate


# The same examples every time, and no shrinking: a failure prints its example, and that will do.
bounded = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@given(mutate=mutations(), mend_length=st.booleans())
@bounded
def test_headers(sandbox: Path, tmp_path: Path, mutate: Mutation, mend_length: bool) -> None:
    raw = (sandbox / "models" / "b" / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    if mend_length:
        header = mutate(raw[8 : 8 + length])
        start = len(header).to_bytes(8, "little") + header
    else:
        start = mutate(raw[: 8 + length])
    path = tmp_path / "model.safetensors"
    path.write_bytes(start + raw[8 + length :])
    try:
        with TensorFile(path, CheckpointError) as file:
            for name in file.entries:
                file.read(name)
    except CheckpointError as problem:
        assert str(path) in str(problem)


@given(mutate=mutations())
@bounded
def test_manifests(sandbox: Path, sound: Sound, mutate: Mutation) -> None:
    path = sandbox / "pack" / "manifest.json"
    path.write_bytes(mutate(sound[1][path]))
    try:
        Manifest.load(path.parent)
        with Pack(path.parent) as pack:
            pack.bytes_by_part()
    except MoecError as problem:
        assert problem.exit_code == 5
        assert str(path.parent) in str(problem)


@given(mutate=mutations())
@bounded
def test_configs(sandbox: Path, sound: Sound, mutate: Mutation) -> None:
    folder = sandbox / "models" / "b"
    path = folder / "config.json"
    path.write_bytes(mutate(sound[1][path]))
    try:
        Checkpoint("b", folder).close()
    except MoecError as problem:
        assert problem.exit_code == 3
        assert str(folder) in str(problem)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["\ud800", "../x", "x" * 1000]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@pytest.mark.parametrize("document", ["models/b/config.json", "pack/manifest.json"])
@given(data=st.data())
@bounded
def test_values_of_other_kinds(
    sandbox: Path, sound: Sound, document: str, data: st.DataObject
) -> None:
    """Damage that is sound JSON: somewhere in the document, a value is another one."""
    path = sandbox / document
    path.write_bytes(sound[1][path])

    def edit(value: object) -> None:
        while isinstance(value, dict | list) and value:
            keys = sorted(value) if isinstance(value, dict) else list(range(len(value)))
            key = data.draw(st.sampled_from(keys))
            inner = value[key]
            if not isinstance(inner, dict | list) or data.draw(st.integers(0, 3)) == 0:
                value[key] = data.draw(VALUES)
                return
            value = inner

    edit_json(path, edit)
    try:
        if document.startswith("pack"):
            Pack(path.parent).close()
        else:
            Checkpoint("b", path.parent).close()
    except MoecError as problem:
        assert str(path.parent) in str(problem)
