"""The attention kernel against float64 row by row: shapes, padding, lengths, what it writes, company and threads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.kernel_toys import guarded, needs_kernels, same_bits, threads, untouched
from torch import Tensor

from equipoise.kernels import cpu

pytestmark = needs_kernels
F32, BF16 = torch.float32, torch.bfloat16
EPSILON = 1e-5
LONG = {8: 2100, 16: 1050, 32: 600, 40: 600, 64: 300, 128: 150}  # prompts beyond CACHED with two key heads, by width


@dataclass(frozen=True)
class Step:
    """B rows, Q query and K key heads of width D, P prompts of up to S tokens; NaN wherever nothing may be read."""

    projected: Tensor  # [B, (Q + 2K) D]
    angles: Tensor  # [B, D / 2]
    norms: tuple[Tensor, Tensor] | None
    own: tuple[Tensor, Tensor]  # [>= B, K, room, D]
    prompt: tuple[Tensor, Tensor]  # [P, K, S, D]
    prompt_of: Tensor
    hidden_of: Tensor
    lengths: Tensor
    dtype: torch.dtype = F32
    scaling: float = 0.3

    def run(self) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """What is attended to [B, Q D], and the own keys and values afterwards; walls around all of it hold."""
        cos, sin = self.angles.cos().repeat(1, 2), torch.cat([-self.angles.sin(), self.angles.sin()], dim=1)
        own = guarded(self.own[0]), guarded(self.own[1])
        rest = [guarded(t) for t in (cos, sin, *self.prompt, self.prompt_of, self.hidden_of, self.lengths)]
        norms = None if self.norms is None else (guarded(self.norms[0]), guarded(self.norms[1]))
        rows_of = (rest[4], rest[5], rest[6])
        attended = cpu.decode_attention(
            guarded(self.projected), rest[0], rest[1], norms, EPSILON, own, (rest[2], rest[3]), rows_of,
            self.scaling, self.dtype,
        )  # fmt: skip
        assert untouched(own[0]) and untouched(own[1])
        return attended, own

    def of(self, rows: list[int]) -> Step:
        """Some of the rows."""
        own = self.own[0][rows], self.own[1][rows]
        changes = {name: getattr(self, name)[rows] for name in ("projected", "angles", "prompt_of", "lengths")}
        return replace(self, own=own, **changes)


def step(
    *,
    width: int = 16,
    queries: int = 4,
    keys: int = 2,
    prompts: tuple[int, ...] = (5, 9, 1),
    prompt_of: tuple[int, ...] = (2, 0, 1, 0, 1),
    lengths: tuple[int, ...] = (0, 3, 17, 2, 8),
    normed: bool = False,
    dtype: torch.dtype = F32,
) -> Step:
    generator = torch.Generator().manual_seed(width + queries)
    longest, room, rows = max(prompts), max(lengths) + 3, len(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hidden, own_lengths = longest - torch.tensor(prompts), torch.tensor(lengths)
    padding_PS = torch.arange(longest) < hidden[:, None]
    spare = 2
    unwritten_BT = torch.arange(room) >= torch.cat([own_lengths, torch.zeros(spare, dtype=torch.long)])[:, None]

    def cached(blank: Tensor) -> Tensor:
        values = normal(len(blank), keys, blank.shape[1], width)
        return values.masked_fill_(blank[:, None, :, None], torch.nan)

    projected = normal(rows, (queries + 2 * keys) * width).to(dtype)
    norms = (1 + 0.3 * normal(width), 1 + 0.3 * normal(width)) if normed else None
    own, prompt = (cached(unwritten_BT), cached(unwritten_BT)), (cached(padding_PS), cached(padding_PS))
    angles = normal(rows, width // 2) * 3
    return Step(projected, angles, norms, own, prompt, torch.tensor(prompt_of), hidden, own_lengths, dtype)


def turned(head_D: Tensor, angles: Tensor, weight: Tensor | None) -> Tensor:
    """Normed, then each pair (x_i, x_{i + D/2}) turned by its angle."""
    if weight is not None:
        head_D = head_D / (head_D.square().mean() + EPSILON).sqrt() * weight.double()
    first, second = head_D.chunk(2)
    cos, sin = angles.cos().double(), angles.sin().double()  # float32 ones, which the kernel gets
    return torch.cat([first * cos - second * sin, second * cos + first * sin])


def twin(of: Step) -> tuple[Tensor, Tensor, Tensor]:
    """Attended [B, Q D], and the new keys and values [B, K, D], one head of one row at a time in float64."""
    width, key_heads = of.own[0].shape[3], of.own[0].shape[1]
    attended, new_keys, new_values = [], [], []
    for b, row in enumerate(of.projected.double()):
        heads, p, own = row.view(-1, width), int(of.prompt_of[b]), int(of.lengths[b])
        queries, hidden = len(heads) - 2 * key_heads, int(of.hidden_of[p])
        key_weight, query_weight = (None, None) if of.norms is None else (of.norms[1], of.norms[0])
        keys = [turned(heads[queries + k], of.angles[b], key_weight) for k in range(key_heads)]
        values = [heads[queries + key_heads + k] for k in range(key_heads)]
        for q in range(queries):
            k = q * key_heads // queries
            seen_keys, seen_values = (
                torch.cat([of.prompt[i][p, k, hidden:].double(), of.own[i][b, k, :own].double(), new[k][None]])
                for i, new in enumerate((keys, values))
            )
            scores = seen_keys @ turned(heads[q], of.angles[b], query_weight) * of.scaling
            attended.append(torch.softmax(scores, 0) @ seen_values)
        new_keys.append(torch.stack(keys))
        new_values.append(torch.stack(values))
    return torch.stack(attended).view(len(of.projected), -1), torch.stack(new_keys), torch.stack(new_values)


def check(of: Step) -> None:
    """All that one call leaves, against the twin."""
    found, own = of.run()
    expected, new_keys, new_values = twin(of)
    # float32: scores are sums of up to 128 products, good to some 1e-6, and so are weights and their averages.
    # bfloat16: half a unit, from that one rounding.
    relative = 2.0**-8 + 1e-5 if of.dtype == BF16 else 0
    assert found.dtype == of.dtype
    torch.testing.assert_close(found.double(), expected, rtol=relative, atol=1e-5)
    rows = torch.arange(len(of.projected))
    for buffer, before, new, tolerance in ((own[0], of.own[0], new_keys, 2e-6), (own[1], of.own[1], new_values, 0)):
        written = buffer[rows, :, of.lengths]
        torch.testing.assert_close(written.double(), new, rtol=tolerance, atol=tolerance)
        after = before.clone()
        after[rows, :, of.lengths] = written
        assert same_bits(buffer, after), "nothing else is written"


@pytest.mark.parametrize("long", [False, True], ids=["short", "long"])
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "head norms"])
@pytest.mark.parametrize(("queries", "keys"), [(2, 2), (6, 2), (4, 1), (3, 3)])
@pytest.mark.parametrize("width", [8, 16, 32, 40, 64, 128])
def test_equals_the_twin(width: int, queries: int, keys: int, normed: bool, long: bool) -> None:
    prompts = (5, 2 * LONG[width] // keys, 1) if long else (5, 9, 1)
    assert (2 * keys * prompts[1] * width * 4 > 256 * 1024) == long, "beyond what stays near a core"
    check(step(width=width, queries=queries, keys=keys, normed=normed, prompts=prompts))


@pytest.mark.parametrize("prompts", [(1, 7), (8, 9), (16, 15), (23, 3)])
@pytest.mark.parametrize("lengths", [(0, 0), (6, 7), (8, 15), (1, 40)])
def test_lengths_around_multiples_of_a_tile(prompts: tuple[int, ...], lengths: tuple[int, ...]) -> None:
    check(step(prompts=prompts, lengths=lengths, prompt_of=(1, 0)))


@pytest.mark.parametrize("prompt_of", [(0, 0, 1, 1, 2), (2, 2, 2, 2, 2), (2, 1, 0, 1, 2)])
def test_prompts_in_any_order(prompt_of: tuple[int, ...]) -> None:
    check(step(prompt_of=prompt_of))


@pytest.mark.parametrize("width", [16, 64])
def test_bfloat16(width: int) -> None:
    """Keys and values are kept in float32, the projected ones come in bfloat16, as does the result."""
    check(step(width=width, normed=True, dtype=BF16))
    wide = replace(step(width=width, dtype=BF16), dtype=F32)
    check(wide)


def test_scores_far_apart() -> None:
    """Hundreds apart, weights underflow to 0: what is left is the value of the best key alone."""
    of = replace(step(), scaling=1.0)
    far = replace(of, projected=of.projected * 300, prompt=(of.prompt[0] * 30, of.prompt[1]))
    found, _ = far.run()
    expected, _, _ = twin(far)
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-3)


def test_by_hand() -> None:
    """No angle, keys with scores ln 1 (prompt), ln 2 (own), ln 3 (new): weights 1/6, 2/6, 3/6 of 6, 12, 18 give 14."""
    logs = torch.tensor([1.0, 2.0, 3.0]).log()
    head = torch.zeros(3, 8)
    head[0, 0], head[1, 0], head[2] = 1.0, logs[2], 18.0
    keys, values = torch.zeros(2, 8), torch.tensor([6.0, 12.0])[:, None].repeat(1, 8)
    keys[:, 0] = logs[:2]
    own = [part[1:].view(1, 1, 1, 8).repeat(1, 1, 2, 1) for part in (keys, values)]
    prompt = [part[:1].view(1, 1, 1, 8) for part in (keys, values)]
    zero, one = torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.long)
    of = Step(head.view(1, -1), torch.zeros(1, 4), None, (own[0], own[1]), (prompt[0], prompt[1]), zero, zero, one)
    found, _ = replace(of, scaling=1.0).run()
    torch.testing.assert_close(found, torch.full((1, 8), 14.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("long", [False, True], ids=["short", "long"])
@pytest.mark.parametrize("width", [16, 32, 128])
def test_a_row_does_not_depend_on_company_order_or_threads(width: int, long: bool) -> None:
    of = step(width=width, queries=6, normed=True, prompts=(5, LONG[width], 1) if long else (5, 9, 1))
    with threads(2):
        both, own = of.run()
    with threads(1):
        again, own_again = of.run()
        assert same_bits(again, both) and same_bits(own_again[0], own[0]) and same_bits(own_again[1], own[1])
        order = [3, 1, 4, 0, 2]
        assert same_bits(of.of(order).run()[0], both[order])
        for b in range(5):
            assert same_bits(of.of([b]).run()[0], both[b : b + 1])
            p = int(of.prompt_of[b])
            alone = replace(of.of([b]), prompt_of=torch.tensor([0]), hidden_of=of.hidden_of[[p]],
                            prompt=(of.prompt[0][[p]], of.prompt[1][[p]]))  # fmt: skip
            assert same_bits(alone.run()[0], both[b : b + 1])


def test_threads_share_no_scratch() -> None:
    """Enough rows that two threads are in the kernel at the same time."""
    many = range(200)
    of = step(width=64, prompt_of=tuple(i % 3 for i in many), lengths=tuple(5 * i % 40 for i in many), normed=True)
    with threads(1):
        alone = of.run()[0]
    with threads(2):
        assert all(same_bits(of.run()[0], alone) for _ in range(5))


@pytest.mark.parametrize("width", [8, 16, 32, 40, 64, 128])
def test_padding_and_the_order_of_work_change_nothing(width: int) -> None:
    """A longer prompt beside these pads them, and beyond CACHED changes who computes what when."""
    of, more = step(width=width), LONG[width]
    prompt = [torch.nn.functional.pad(part, (0, 0, more, 0), value=torch.nan) for part in of.prompt]
    padded = replace(of, prompt=(prompt[0], prompt[1]), hidden_of=of.hidden_of + more)
    assert same_bits(padded.run()[0], of.run()[0])


def test_no_row_and_no_prompt_token() -> None:
    of = step()
    assert of.of([]).run()[0].shape == (0, 64)
    check(replace(of, hidden_of=torch.full((3,), 9)))
    check(
        replace(of, hidden_of=torch.zeros(3, dtype=torch.long), prompt=(of.prompt[0][:, :, :0], of.prompt[1][:, :, :0]))
    )


CHANGES: dict[str, Callable[[Step], dict[str, Any]]] = {
    "projected of fewer rows": lambda of: {"projected": of.projected[:4]},
    "projected too wide": lambda of: {"projected": torch.zeros(5, 8 * 16 + 1)},
    "queries that keys do not divide": lambda of: {"projected": torch.zeros(5, 7 * 16)},
    "float64 projected": lambda of: {"projected": of.projected.double()},
    "fewer heads than keys": lambda of: {"projected": torch.zeros(5, 16)},
    "angles of more rows": lambda of: {"angles": torch.zeros(6, 8)},
    "short angles": lambda of: {"angles": torch.zeros(5, 4)},
    "float64 angles": lambda of: {"angles": of.angles.double()},
    "short norm": lambda of: {"norms": (torch.ones(15), torch.ones(16))},
    "bfloat16 norm": lambda of: {"norms": (torch.ones(16), torch.ones(16, dtype=BF16))},
    "own of fewer rows": lambda of: {"own": (of.own[0][:4], of.own[1][:4])},
    "own values of another room": lambda of: {"own": (of.own[0], of.own[1][:, :, :-1])},
    "bfloat16 own": lambda of: {"own": (of.own[0].to(BF16), of.own[1].to(BF16))},
    "prompt of other heads": lambda of: {"prompt": (of.prompt[0][:, :1], of.prompt[1][:, :1])},
    "prompt values of another length": lambda of: {"prompt": (of.prompt[0], of.prompt[1][:, :, 1:])},
    "float64 prompt": lambda of: {"prompt": (of.prompt[0].double(), of.prompt[1].double())},
    "prompt_of of more rows": lambda of: {"prompt_of": torch.zeros(6, dtype=torch.long)},
    "int32 prompt_of": lambda of: {"prompt_of": of.prompt_of.int()},
    "hidden_of of fewer prompts": lambda of: {"hidden_of": of.hidden_of[:2]},
    "int32 hidden_of": lambda of: {"hidden_of": of.hidden_of.int()},
    "lengths of fewer rows": lambda of: {"lengths": of.lengths[:4]},
    "int32 lengths": lambda of: {"lengths": of.lengths.int()},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_does_not_fit_is_refused(change: str) -> None:
    of = step()
    with pytest.raises(ValueError, match=r"a kernel got|queries for"):
        replace(of, **CHANGES[change](of)).run()


def test_another_type_of_result_is_refused() -> None:
    with pytest.raises(ValueError, match="float16"):
        replace(step(), dtype=torch.float16).run()


def test_heads_of_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="12 wide"):
        step(width=12).run()


@pytest.mark.parametrize("place", range(8))
def test_strides_are_refused(place: int) -> None:
    """Each of projected, cos, sin, own keys and values, prompt keys and values, prompt_of in turn."""
    of = step()
    angles = of.angles.repeat(1, 2)
    tensors = [of.projected, angles, angles, *of.own, *of.prompt, of.prompt_of]
    tensors[place] = tensors[place].repeat_interleave(2, dim=-1)[..., ::2]
    projected, cos, sin, keys, values, prompt_keys, prompt_values, prompt_of = tensors
    rows_of, prompt = (prompt_of, of.hidden_of, of.lengths), (prompt_keys, prompt_values)
    with pytest.raises(ValueError, match="strides"):
        cpu.decode_attention(projected, cos, sin, None, 0.0, (keys, values), prompt, rows_of, 1.0, F32)


def test_nothing_is_read_beyond_an_end() -> None:
    """Every tensor at the edge of a page that may not be touched, in a process that a fault may end."""
    root = Path(__file__).parents[3]
    ended = subprocess.run([sys.executable, "-m", "tests.kernel_bounds"], cwd=root, capture_output=True, text=True)
    assert ended.returncode == 0 and "done" in ended.stdout, ended.stderr[-2000:] or ended.returncode
