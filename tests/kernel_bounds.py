"""Every kernel on tensors that end, or begin, where a page begins that may not be touched.

Run as a script by `tests/unit/kernels/test_decode_attention.py`: a read beyond an end stops the process.
"""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

from equipoise.kernels import cpu

PAGE = mmap.PAGESIZE
_LIBC = ctypes.CDLL(None, use_errno=True)
_kept: list[mmap.mmap] = []


def at_an_edge(values: Tensor, *, at_end: bool) -> Tensor:
    """A copy between two closed pages, beside the second or the first."""
    size = max(values.numel() * values.element_size(), 1)
    inside = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, inside + 2 * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for closed in (start, start + PAGE + inside):
        if _LIBC.mprotect(ctypes.c_void_p(closed), ctypes.c_size_t(PAGE), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    _kept.append(memory)
    place = PAGE + (inside - size if at_end else 0)
    if not values.numel():
        return values
    edge = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=place)
    return edge.view(values.shape).copy_(values)


def run(width: int, dtype: torch.dtype, *, at_end: bool) -> None:
    """Sizes that are no multiples of anything, and rows that fill their buffers to the last token."""

    def edge(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        return at_an_edge(torch.randn(*shape).to(of), at_end=at_end)

    def numbers(*values: int) -> Tensor:
        return at_an_edge(torch.tensor(values), at_end=at_end)

    odd = width + 5
    cpu.residual_norm(edge(3, odd, of=dtype), edge(3, odd, of=dtype), edge(odd, of=dtype), 1e-6, dtype)
    cpu.silu_times(edge(3, odd, of=dtype), edge(3, odd, of=dtype))
    cpu.silu_times(*edge(3, 2 * odd, of=dtype).chunk(2, dim=1))
    inverse, weight = edge(3, 1), edge(odd, of=dtype)
    inputs, gradient, plus = (edge(3, odd, of=dtype) for _ in range(3))
    cpu.norm_gradients(inputs, inverse, weight, gradient, plus, dtype, for_weight=True)
    cpu.silu_gradients(edge(3, odd, of=dtype), edge(3, odd, of=dtype), edge(3, odd, of=dtype))
    cpu.rotate_heads(edge(3, 2, width, of=dtype), edge(3, width, of=dtype), edge(3, width, of=dtype), dtype, back=True)
    if dtype == torch.bfloat16 and cpu.FewRows.supported():
        for rows in (1, 7, 19):
            multiply = cpu.FewRows(edge(odd, 2 * odd, of=dtype), edge(odd, of=dtype))
            multiply(edge(rows, 2 * odd, of=dtype), edge(rows, odd, of=dtype))
    cpu.sample_tokens(edge(3, odd + 64), at_an_edge(torch.tensor([0.0, 0.5, 1.0]), at_end=at_end), 0.7)
    for room, length in ((5, 3), (8, 8), (1, 0)):
        own, prompt = (
            (edge(3, 2, room, width), edge(3, 2, room, width)),
            (edge(2, 2, length, width), edge(2, 2, length, width)),
        )
        rows_of = numbers(1, 0, 1), numbers(0, length), numbers(0, room // 2, room - 1)
        projected, cos, sin = edge(3, 8 * width, of=dtype), edge(3, width), edge(3, width)
        norms = edge(width), edge(width)
        cpu.decode_attention(projected, cos, sin, norms, 1e-6, own, prompt, rows_of, 0.3, dtype)


if __name__ == "__main__":
    for number in (8, 32, 40, 128):
        for kind in (torch.float32, torch.bfloat16):
            for end in (True, False):
                run(number, kind, at_end=end)
    print("done")
