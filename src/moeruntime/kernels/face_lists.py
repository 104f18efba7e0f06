"""Which tokens go to which expert, as the kernels read it. Imports no Triton.

Legend: L layers, F faces, C places for pairs, T tokens, K experts a token.
"""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

__all__ = ["FaceLists"]


class FaceLists:
    """Which (token, choice) pairs each face of each layer is to serve in a step.

    Attributes:
        counts_LF: int32; pairs of each face; F is rounded up to a power of 2.
        pairs_LFC: int32; the pairs, token * K + choice, in no particular order.
        weights_TK: float32 routing weights of the layer routed last.
        most_wanted: faces of a layer that a step can want, as far as is known beforehand.
    """

    def __init__(
        self,
        num_layers: int,
        num_faces: int,
        max_tokens: int,
        top_k: int,
        device: torch.device,
        *,
        most_wanted: int | None = None,
    ) -> None:
        """Allocate; `reset` empties the lists before every step."""
        self.most_wanted = num_faces if most_wanted is None else min(most_wanted, num_faces)
        # Rows begin at 16 bytes, so that kernels are compiled for one alignment.
        width = max(4, 1 << (num_faces - 1).bit_length())
        num_pairs = -(-max_tokens * top_k // 4) * 4
        self.counts_LF = torch.zeros(num_layers, width, dtype=torch.int32, device=device)
        self.pairs_LFC = torch.zeros(
            num_layers, num_faces, num_pairs, dtype=torch.int32, device=device
        )
        self.weights_TK = torch.zeros(max_tokens, top_k, dtype=torch.float32, device=device)

    @classmethod
    def of(cls, faces_TK: Tensor, weights_TK: Tensor, num_faces: int) -> FaceLists:
        """The lists of one layer whose tokens are routed already.

        Args:
            faces_TK: int64.
            weights_TK: float32.
            num_faces: of the layer.
        """
        num_tokens, top_k = faces_TK.shape
        lists = cls(1, num_faces, num_tokens, top_k, faces_TK.device)
        lists.weights_TK.copy_(weights_TK)
        faces_M = faces_TK.flatten()
        order_M = faces_M.argsort(stable=True)
        ones_M = torch.ones_like(faces_M, dtype=torch.int32)
        counts_F = lists.counts_LF[0].scatter_add_(0, faces_M, ones_M)
        first_F = counts_F.cumsum(0) - counts_F
        sorted_M = faces_M[order_M]
        place_M = torch.arange(len(order_M), device=order_M.device) - first_F[sorted_M]
        lists.pairs_LFC[0, sorted_M, place_M] = order_M.int()
        return lists

    def num_tiles(self, num_pairs: int, tokens: int) -> int:
        """Most tiles of up to `tokens` pairs of one face that so many pairs can form."""
        num_faces = self.counts_LF.shape[1]
        return min(num_pairs, (num_pairs + num_faces * (tokens - 1)) // tokens)

    def wanting(self, most: int) -> FaceLists:
        """The same lists, for steps that can want so many faces of a layer at most."""
        lists = copy(self)
        lists.most_wanted = min(most, self.most_wanted)
        return lists

    def reset(self) -> None:
        """Forget all pairs."""
        self.counts_LF.zero_()
