"""Random numbers from a counter: u = f(seed, step, prompt, completion, token).

A completion then depends on nothing but its own coordinates: not on which rows share its batch, how many
processes there are, or what was sampled before a resume.
"""

from __future__ import annotations

import numpy as np

_MASK = 0xFFFFFFFFFFFFFFFF
_INCREMENT = 0x9E3779B97F4A7C15


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): a bijection of 64 bits that passes BigCrush."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _absorb(state: np.ndarray, word: np.ndarray | int) -> np.ndarray:
    offset = np.asarray(word, dtype=np.uint64) * np.uint64(_INCREMENT) + np.uint64(_INCREMENT)
    return _mix(state + _mix(offset))


def uniforms(seed: int, step: int, prompts_B: np.ndarray, completions_B: np.ndarray, num_tokens: int) -> np.ndarray:
    """Uniform numbers in [0, 1) with 23 bits, float32 [B, num_tokens].

    23 bits, not 24: `u * total` must stay below a float32 total after rounding, so that inverting a cumulative sum
    never runs past its last entry.

    Args:
        seed, step: of the run and of the step in it.
        prompts_B: index of the row's prompt within the step, over all processes.
        completions_B: index of the row's completion within its group.
    """
    with np.errstate(over="ignore"):
        state = _absorb(_absorb(np.zeros(len(prompts_B), dtype=np.uint64), seed & _MASK), step & _MASK)
        state = _absorb(_absorb(state, prompts_B.astype(np.uint64)), completions_B.astype(np.uint64))
        words_BT = _absorb(state[:, None], np.arange(num_tokens, dtype=np.uint64)[None, :])
    return (words_BT >> np.uint64(41)).astype(np.float32) * np.float32(2.0**-23)


def derived_seed(seed: int, *words: int) -> int:
    """A 63-bit seed for a generator that is used at these coordinates only."""
    with np.errstate(over="ignore"):
        state = _absorb(np.zeros(1, dtype=np.uint64), seed & _MASK)
        for word in words:
            state = _absorb(state, word & _MASK)
    return int(state[0] >> np.uint64(1))
