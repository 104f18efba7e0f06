"""Coverage-guided fuzzing of the parsers of bytes from outside, for as long as it is given.

Whatever the bytes are, the answer must be a value or one of moec's errors, in one line. The corpus
begins with the golden files, and grows in a folder if one is given.

    scripts/fuzz 60
    PYTHONPATH=src python tests/fuzz.py manifest --seconds 60 --corpus DIR
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["moeruntime", "moeconsolidate.plan"]):
    from moeconsolidate.plan import ConsolidationPlan, LayerPlan, Recipe, default_code
    from moeruntime.errors import InputError, IntegrityError, MoecError
    from moeruntime.pack.manifest_json import parse_manifest
    from moeruntime.strict_json import Fields, canonical_json, parse_json
    from moeruntime.tensorfile import TensorFile

GOLDEN = Path(__file__).parent / "golden"


def header(data: bytes) -> None:
    """A safetensors file; kept in memory, and small tensors at most."""
    fd = os.memfd_create("fuzz")
    try:
        os.write(fd, data)
        with TensorFile(Path(f"/proc/self/fd/{fd}"), InputError) as file:
            assert sum(entry.num_bytes for entry in file.entries.values()) <= len(data)
    finally:
        os.close(fd)


def manifest(data: bytes) -> None:
    """A pack's manifest."""
    source = Fields(parse_json(data, "fuzz", IntegrityError), "fuzz", IntegrityError)
    found = parse_manifest(source)
    again = Fields(parse_json(found.to_bytes(), "again", IntegrityError), "again", IntegrityError)
    assert parse_manifest(again) == found


def plan(data: bytes) -> None:
    """A plan of `moec plan`."""
    ConsolidationPlan.from_bytes(data, "fuzz")


def seeds(target: str) -> list[bytes]:
    """Sound documents to begin with."""
    if target == "plan":
        layer = LayerPlan.from_labels(0, [0, 1, 0, 2], 2)
        coded = layer.with_codes([[(default_code(4),) * 2] * len(one) for one in layer.slots])
        made = ConsolidationPlan(Recipe(0.9, code="nested"), (coded,))
        return [canonical_json(made.to_json())]
    pattern = "variants/*.safetensors" if target == "header" else "manifest.json"
    return [path.read_bytes() for path in sorted(GOLDEN.glob(f"pack*/{pattern}"))]


TARGETS: dict[str, Callable[[bytes], None]] = {"header": header, "manifest": manifest, "plan": plan}


def checked(parse: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """A target that takes moec's errors for answers, as long as they are one line."""

    def run(data: bytes) -> None:
        try:
            parse(data)
        except MoecError as problem:
            assert "\n" not in str(problem), ascii(str(problem))

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument(
        "--seed", type=int, default=0, help="the same runs again; 0: others each time"
    )
    parser.add_argument("--corpus", type=Path, help="keep what was found there")
    args = parser.parse_args()
    corpus = args.corpus or Path(tempfile.mkdtemp(prefix="moec-fuzz-"))
    corpus.mkdir(exist_ok=True)
    for number, seed in enumerate(seeds(args.target)):
        (corpus / f"sound-{number}").write_bytes(seed)
    options = [f"-max_total_time={args.seconds}", f"-seed={args.seed}"]
    options += ["-max_len=65536", "-timeout=10"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], checked(TARGETS[args.target]))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
