"""The figures of one run, as JSON and as a table for people."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from moeruntime.bench.ceilings import Ceilings
from moeruntime.bench.decode import DecodeRow
from moeruntime.bench.memory import MemoryRow
from moeruntime.bench.prompts import PrefillRow, TtftRow

__all__ = ["LoadRow", "Report"]


@dataclass(frozen=True, slots=True)
class LoadRow:
    """Loading an engine.

    Attributes:
        time_s: until it could take requests.
        weights_bytes: brought to the device and to host memory.
        ceiling_bytes_per_s: the slower of reading the pack's files again and of a pinned copy; None
            for synthetic weights, which are made and not read.
    """

    time_s: float
    weights_bytes: int
    ceiling_bytes_per_s: float | None

    @property
    def bytes_per_s(self) -> float:
        return self.weights_bytes / self.time_s

    @property
    def of_ceiling(self) -> float | None:
        return self.bytes_per_s / self.ceiling_bytes_per_s if self.ceiling_bytes_per_s else None


@dataclass(frozen=True, slots=True)
class Report:
    """Everything `moec bench` measured.

    Attributes:
        model: the pack's path, or which synthetic one.
        code: how experts are stored: "bf16" or the like, or "nested".
        variants, resident: all of them, and how many are on the device at once.
        device, dtype, torch: where, in what, and with which PyTorch.
        peak_bytes: the most ever taken: the allocator's on CUDA, the process's on a CPU.
    """

    model: str
    code: str
    variants: int
    resident: int
    device: str
    dtype: str
    torch: str
    ceilings: Ceilings
    load: LoadRow
    memory: list[MemoryRow]
    peak_bytes: int
    decode: list[DecodeRow]
    prefill: list[PrefillRow]
    ttft: list[TtftRow]

    def to_json(self) -> dict[str, Any]:
        """Plain data; names end in their units."""
        data = asdict(self) | {"benchmark": "bench"}
        rates = {
            "load": ("bytes_per_s", "of_ceiling"),
            "decode": ("tokens_per_s", "of_roofline"),
            "prefill": ("tokens_per_s", "flops_per_s"),
        }
        for part, names in rates.items():
            rows, found = getattr(self, part), data[part]
            pairs = [(rows, found)] if part == "load" else zip(rows, found, strict=True)
            for row, values in pairs:
                values.update({name: getattr(row, name) for name in names})
        return data

    def lines(self) -> Iterator[str]:
        """A table a part."""
        best = self.ceilings
        yield f"{self.model} ({self.code}), {self.variants} variants, {self.resident} resident"
        yield f"{self.device}, {self.dtype}, torch {self.torch}"
        yield ""
        yield "at best"
        yield f"  read memory            {best.read_bytes / 1e9:12.1f} GB/s"
        yield f"  large product          {best.gemm_flops / 1e12:12.2f} TFLOP/s"
        if best.copy_bytes is not None:
            yield f"  copy pinned memory     {best.copy_bytes / 1e9:12.1f} GB/s"
        yield ""
        yield from self._load_lines()
        yield ""
        yield "memory, MB                                predicted     measured"
        for part in self.memory:
            yield (
                f"  {part.part:38s} {part.predicted_bytes / 1e6:10.1f} "
                f"{part.measured_bytes / 1e6:12.1f}"
            )
        yield f"  {'the most ever taken':38s} {'':10s} {self.peak_bytes / 1e6:12.1f}"
        if self.decode:
            yield ""
            yield from self._decode_lines()
        if self.prefill:
            yield ""
            yield "prefill, one variant"
            yield "  tokens          ms    tokens/s     TFLOP/s   of product"
            for row in self.prefill:
                yield (
                    f"  {row.tokens:6d} {row.time_s * 1e3:11.2f} {row.tokens_per_s:11.0f} "
                    f"{row.flops_per_s / 1e12:11.2f} {row.of_gemm:12.1%}"
                )
        if self.ttft:
            yield ""
            yield "time to the first token, ms"
            yield "  tokens    roofline  same variant  after another        cold  copy alone"
            for one in self.ttft:
                yield (
                    f"  {one.tokens:6d} {_ms(one.roofline_s):>11s} {_ms(one.same_s):>13s} "
                    f"{_ms(one.after_another_s):>14s} {_ms(one.cold_s):>11s} {_ms(one.copy_s):>11s}"
                )

    def _load_lines(self) -> Iterator[str]:
        load = self.load
        yield "loading"
        line = (
            f"  {load.weights_bytes / 1e9:.3f} GB in {load.time_s:.2f} s: "
            f"{load.bytes_per_s / 1e9:.2f} GB/s"
        )
        if load.ceiling_bytes_per_s:
            line += (
                f", {load.of_ceiling:.0%} of {load.ceiling_bytes_per_s / 1e9:.2f} GB/s, "
                "the slower of reading and copying"
            )
        else:
            line += ", made and not read"
        yield line

    def _decode_lines(self) -> Iterator[str]:
        yield f"decode, context {self.decode[0].context}"
        yield (
            "  batch  variants  experts/layer         GB  roofline ms      step ms  of roofline"
            "    tokens/s   in engine"
        )
        for row in self.decode:
            whole = "-" if row.engine_tokens_per_s is None else f"{row.engine_tokens_per_s:.0f}"
            yield (
                f"  {row.batch:5d} {row.variants:9d} {row.experts_per_layer:14.2f} "
                f"{row.step_bytes / 1e9:10.3f} {row.roofline_s * 1e3:12.3f} "
                f"{row.step_s * 1e3:12.3f} {row.of_roofline:12.1%} {row.tokens_per_s:11.0f} "
                f"{whole:>11s}"
            )


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.2f}"
