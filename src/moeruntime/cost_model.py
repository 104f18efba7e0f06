"""What a step takes: for itself, for each sequence that decodes, for prompts and for their tokens.

The scheduler weighs service with it and sizes steps by it; simulations take their time from it.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LearnedCost", "StepCost"]


@dataclass(frozen=True, slots=True)
class StepCost:
    """A linear model of one device; all in seconds.

    Attributes:
        base_s: of a step that does next to nothing; mostly weights that every step reads.
        decode_s: more for each sequence that decodes.
        prompt_s: more where there is any prompt: such a step reads more weights.
        prompt_token_s: more for each prompt token.
    """

    base_s: float
    decode_s: float
    prompt_s: float
    prompt_token_s: float

    def step_s(self, num_decodes: int, num_prompt_tokens: int) -> float:
        """What a step takes."""
        prompts_s = self.prompt_s + self.prompt_token_s * num_prompt_tokens
        return self.base_s + self.decode_s * num_decodes + (prompts_s if num_prompt_tokens else 0.0)

    def prompt_tokens_within(self, limit_s: float, num_decodes: int) -> int:
        """Prompt tokens that a step may have beside its decodes to take no longer than this."""
        left_s = limit_s - self.step_s(num_decodes, 0) - self.prompt_s
        return max(0, int(left_s / self.prompt_token_s))


NUM_FEATURES = 4


class LearnedCost:
    """A `StepCost` fitted to the steps seen lately: least squares that forget.

    Starts from a guess, which counts as a few observations, so that no step can throw it far.
    """

    HALF_LIFE_STEPS = 200.0
    LONGEST_STEP_S = 60.0

    def __init__(self, start: StepCost) -> None:
        """Begin with a guess."""
        self.cost = start
        self._keep = 0.5 ** (1.0 / self.HALF_LIFE_STEPS)
        self._products = [[0.0] * NUM_FEATURES for _ in range(NUM_FEATURES)]
        self._moments = [0.0] * NUM_FEATURES
        for num_decodes, num_prompt_tokens in ((1, 0), (16, 0), (0, 8), (0, 256), (8, 1024)):
            elapsed_s = start.step_s(num_decodes, num_prompt_tokens)
            self._count(num_decodes, num_prompt_tokens, elapsed_s)

    def observe(self, num_decodes: int, num_prompt_tokens: int, elapsed_s: float) -> None:
        """Learn from one step."""
        if not 0.0 < elapsed_s < self.LONGEST_STEP_S:
            return
        for row in self._products:
            row[:] = [value * self._keep for value in row]
        self._moments = [value * self._keep for value in self._moments]
        self._count(num_decodes, num_prompt_tokens, elapsed_s)
        self._fit()

    def _count(self, num_decodes: int, num_prompt_tokens: int, elapsed_s: float) -> None:
        # Relative errors count: short steps are many, and as well known as long ones.
        features = [one / elapsed_s for one in _features(num_decodes, num_prompt_tokens)]
        for i, left in enumerate(features):
            self._moments[i] += left
            for j, right in enumerate(features):
                self._products[i][j] += left * right

    def _fit(self) -> None:
        base, decode, prompt, token = _solve(self._products, self._moments)
        # Noise can turn a small coefficient negative; the least that makes sense is used instead.
        self.cost = StepCost(
            max(base, 0.0), max(decode / 16, 1e-7), max(prompt, 0.0), max(token / 256, 1e-8)
        )


def _features(num_decodes: int, num_prompt_tokens: int) -> tuple[float, ...]:
    """Of like size, so that one small ridge suits all."""
    return 1.0, num_decodes / 16, float(num_prompt_tokens > 0), num_prompt_tokens / 256


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Gaussian elimination; the matrix is symmetric and gets a small ridge."""
    size = len(right)
    rows = [
        [value * (1 + 1e-6 * (i == j)) for j, value in enumerate(row)] + [right[i]]
        for i, row in enumerate(matrix)
    ]
    for i in range(size):
        for j in range(i + 1, size):
            factor = rows[j][i] / rows[i][i]
            rows[j] = [a - factor * b for a, b in zip(rows[j], rows[i], strict=True)]
    answer = [0.0] * size
    for i in reversed(range(size)):
        known = sum(rows[i][j] * answer[j] for j in range(i + 1, size))
        answer[i] = (rows[i][size] - known) / rows[i][i]
    return answer
