"""How alike experts are.

Legend: E (rows, one per variant and expert), P (weights of an expert, or other numbers that
describe it), N (samples of an expert), F (features of a sample).

The dot products of rows of 10^8 weights are where precision is lost: a float32 cosine similarity
over 58.7 million weights came out as 1.0091. Here they are accumulated in float64, over fixed
stripes of columns that are summed in a fixed order, each stripe by a single thread. The number of
threads decides how long it takes and never what comes out.

Of 16-bit weights a product is exact in float32, and so a few are added up there, before that goes
into the float64 sum: faster, and the result, which is float32, within its last digit. Weights
so large or small that float32 cannot hold their squares are compared in float64 throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import torch
from torch import Tensor

from moeconsolidate.threads import single_threaded_torch
from moeruntime.errors import CheckpointError

__all__ = ["check_rows", "cosine_similarity", "linear_cka", "warm_up"]

NUM_STRIPES = 16
MAX_SAMPLES = 512
"""Samples of an expert that `linear_cka` looks at; its cost is their square."""

SAFE_SQUARES = (1e-20, 1e30)
"""Squared norms of rows between these cannot have suffered from float32's range."""

CHUNK_ELEMENTS = 2**18
"""Weights converted to float64 at once by one thread: 2 MiB, which stays in its cache."""


def cosine_similarity(
    experts_EP: Tensor, *, describe: Callable[[int], str], what: str = "weight"
) -> Tensor:
    """Pairwise cosine similarity of one layer's experts across variants.

    Args:
        experts_EP: one row per (variant, expert): gate_proj | up_proj | down_proj, flattened.
            Any float dtype. Peak scratch: 2 MiB a thread and 16 matrices of 8 * E * E bytes.
        describe: names a row in messages, such as "math: layer 3, expert 5".
        what: names one number of a row in messages.

    Returns:
        similarity_EE, float32 in [-1, 1], symmetric, diagonal exactly 1. The same bits for any
        number of threads.

    Raises:
        CheckpointError: a row is zero or not finite.
    """
    num_rows = experts_EP.shape[0]

    def stripe_gram(columns: range) -> Tensor:
        gram_EE = torch.zeros(num_rows, num_rows, dtype=torch.float64)
        for chunk_EC in _chunks(experts_EP, columns):
            gram_EE.addmm_(chunk_EC, chunk_EC.T)
        return gram_EE

    def quick_stripe_gram(columns: range) -> Tensor:
        from moeconsolidate.kernels.products import add_products

        gram_EE = torch.zeros(num_rows, num_rows, dtype=torch.float64)
        for chunk_EC in _chunks(experts_EP, columns, torch.float32):
            add_products(chunk_EC.contiguous().numpy(), gram_EE.numpy())
        return gram_EE.triu() + gram_EE.triu(1).T

    quick = experts_EP.dtype.itemsize == 2
    gram_EE = _sum_over_stripes(quick_stripe_gram if quick else stripe_gram, experts_EP)
    low, high = gram_EE.diagonal().aminmax()
    if quick and not (SAFE_SQUARES[0] < low and high < SAFE_SQUARES[1]):
        gram_EE = _sum_over_stripes(stripe_gram, experts_EP)
    squares_E = gram_EE.diagonal().clone()
    _check_squares(squares_E, describe, what)
    norms_E = squares_E.sqrt()
    similarity_EE = gram_EE.div_(norms_E[:, None]).div_(norms_E)
    similarity_EE = ((similarity_EE + similarity_EE.T) / 2).clamp_(-1.0, 1.0)
    return similarity_EE.fill_diagonal_(1.0).float()


def warm_up() -> None:
    """Load the kernels, which takes half a second, or more where they are compiled first."""
    from moeconsolidate.kernels.products import add_products

    add_products(torch.ones(1, 1).numpy(), torch.ones(1, 1, dtype=torch.float64).numpy())


def check_rows(experts_EP: Tensor, *, describe: Callable[[int], str]) -> None:
    """Raise what `cosine_similarity` raises, without comparing anything."""

    def stripe_squares(columns: range) -> Tensor:
        squares_E = torch.zeros(experts_EP.shape[0], dtype=torch.float64)
        for chunk_EC in _chunks(experts_EP, columns):
            squares_E += chunk_EC.square_().sum(dim=1)
        return squares_E

    _check_squares(_sum_over_stripes(stripe_squares, experts_EP), describe, "weight")


def linear_cka(
    samples_of: Callable[[int], Tensor],
    num_rows: int,
    *,
    describe: Callable[[int], str],
    what: str,
) -> Tensor:
    """Pairwise linear centred kernel alignment of one layer's experts across variants.

    Kornblith et al., "Similarity of Neural Network Representations Revisited" (2019),
    https://arxiv.org/abs/1905.00414. With X the samples [N, F] of an expert, less their mean, and
    K = X X^T, it is the cosine of two such matrices: <K, K'> / (|K| |K'|). It does not change when
    features are rotated or all scaled alike; it does when samples change places.

    Args:
        samples_of: row -> its samples [N, F], equally many and in the same order for every row,
            any float dtype. Of more than MAX_SAMPLES, so many are taken, evenly spread.
        num_rows: E. Memory: 8 * E * N * N bytes, N at most MAX_SAMPLES.
        describe: names a row in messages.
        what: names one sample in messages.

    Returns:
        similarity_EE, float32 in [0, 1], symmetric, diagonal exactly 1. The same bits for any
        number of threads.

    Raises:
        CheckpointError: a row's samples are all the same, or not finite.
    """

    def kernel(row: int) -> Tensor:
        samples_NF = samples_of(row)
        samples_NF = samples_NF[:: -(-len(samples_NF) // MAX_SAMPLES)].double()
        centred_NF = samples_NF - samples_NF.mean(dim=0)
        return (centred_NF @ centred_NF.T).flatten()

    with single_threaded_torch() as num_threads, ThreadPoolExecutor(num_threads) as pool:
        kernels = torch.stack(list(pool.map(kernel, range(num_rows))))
    return cosine_similarity(kernels, describe=describe, what=f"{what} deviation")


def _check_squares(squares_E: Tensor, describe: Callable[[int], str], what: str) -> None:
    """Squared norms tell it all: no finite weight of 32 bits overflows or vanishes in float64."""
    for row, square in enumerate(squares_E.tolist()):
        if square == 0.0:
            raise CheckpointError(f"{describe(row)}: all {what}s are zero")
        if not square < float("inf"):
            raise CheckpointError(f"{describe(row)}: a {what} is not finite (NaN or infinity)")


def _chunks(
    experts_EP: Tensor, columns: range, dtype: torch.dtype = torch.float64
) -> Iterator[Tensor]:
    """Cut a range of columns into wider pieces that share one buffer."""
    num_rows = experts_EP.shape[0]
    width = max(1, CHUNK_ELEMENTS // num_rows)
    scratch_EC = torch.empty(num_rows, min(width, len(columns)), dtype=dtype)
    for start in range(columns.start, columns.stop, width):
        stop = min(start + width, columns.stop)
        yield scratch_EC[:, : stop - start].copy_(experts_EP[:, start:stop])


def _sum_over_stripes(work: Callable[[range], Tensor], experts_EP: Tensor) -> Tensor:
    num_columns = experts_EP.shape[1]
    bounds = [num_columns * idx // NUM_STRIPES for idx in range(NUM_STRIPES + 1)]
    stripes = [range(start, stop) for start, stop in pairwise(bounds)]
    with single_threaded_torch() as num_threads, ThreadPoolExecutor(num_threads) as pool:
        first, *rest = pool.map(work, stripes)
    for part in rest:
        first += part
    return first
