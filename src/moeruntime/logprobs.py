"""What the model thought of tokens: log-probabilities, and the likeliest alternatives.

Natural logarithms of the model's own distribution, before temperature, top-k and top-p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeruntime.kernels.spans import to_device
from moeruntime.request import SamplingParams, TokenLogprobs

__all__ = ["PendingLogprobs", "logprobs_of", "wanted_logprobs"]

# Rows of logits looked at together; bounds a [rows, vocabulary] float32 tensor.
ROWS = 512


@dataclass(frozen=True, slots=True)
class PendingLogprobs:
    """Log-probabilities of some rows of a step, perhaps still on their way to the host.

    Attributes:
        num_top: alternatives that each row wants; None where a row wants nothing.
    """

    num_top: Sequence[int | None]
    _chosen_W: Tensor
    _top_ids_WK: Tensor
    _top_WK: Tensor

    def read(self) -> list[TokenLogprobs | None]:
        """One entry a row; the device must have come this far."""
        chosen, ids, top = (
            one.tolist() for one in (self._chosen_W, self._top_ids_WK, self._top_WK)
        )
        places = iter(range(len(chosen)))
        found: list[TokenLogprobs | None] = []
        for count in self.num_top:
            if count is None:
                found.append(None)
                continue
            at = next(places)
            pairs = zip(ids[at][:count], top[at][:count], strict=True)
            found.append(TokenLogprobs(chosen[at], tuple(pairs)))
        return found


def wanted_logprobs(
    logits_NV: Tensor, tokens_N: Tensor, params: Sequence[SamplingParams]
) -> PendingLogprobs | None:
    """Log-probabilities of the tokens chosen, for those rows that ask; None where none does.

    Nothing waits for the device.
    """
    num_top = [one.logprobs for one in params]
    rows = [row for row, count in enumerate(num_top) if count is not None]
    if not rows:
        return None
    rows_W = to_device(torch.tensor(rows), logits_NV.device)
    most = max(count for count in num_top if count is not None)
    chosen_W, ids_WK, top_WK = _look(logits_NV[rows_W], tokens_N[rows_W], most)
    if logits_NV.is_cuda:
        chosen_W, ids_WK, top_WK = _to_host(chosen_W), _to_host(ids_WK), _to_host(top_WK)
    return PendingLogprobs(num_top, chosen_W, ids_WK, top_WK)


def logprobs_of(logits_NV: Tensor, tokens: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """Log-probabilities of given tokens; waits for the device.

    Args:
        logits_NV: float32, a row for each token.
        tokens: N ids.
        num_top: alternatives to list beside each.
    """
    tokens_N = torch.tensor(list(tokens), device=logits_NV.device)
    parts = [part.cpu() for part in _look(logits_NV, tokens_N, num_top)]
    read = PendingLogprobs([num_top] * len(tokens), *parts).read()
    return [one for one in read if one is not None]


def _look(logits_NV: Tensor, tokens_N: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    logprobs_NV = logits_NV.log_softmax(dim=-1)
    top = logprobs_NV.topk(min(num_top, logprobs_NV.shape[1]), dim=-1)
    return logprobs_NV.gather(1, tokens_N[:, None])[:, 0], top.indices, top.values


def _to_host(part: Tensor) -> Tensor:
    host = torch.empty(part.shape, dtype=part.dtype, pin_memory=True)
    host.copy_(part, non_blocking=True)
    return host
