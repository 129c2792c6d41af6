"""Numbers, verdicts and the text of models."""

from __future__ import annotations

import pytest

from equipoise.evaluation.report.schema import Estimate
from equipoise.evaluation.report.text import (
    amount,
    duration,
    joined,
    number,
    percent,
    policy_label,
    value_and_interval,
    verdict,
    visible,
    visible_line,
)


def test_number() -> None:
    assert number(-0.126) == "−0.13"
    assert number(0.126, signed=True) == "+0.13"
    assert number(-0.001) == "0.00" and number(0.001, signed=True) == "0.00"
    assert number(None) == "–"
    assert number(1234.5, 0) == "1,234"


@pytest.mark.parametrize(
    ("ci95", "expected"),
    [
        ((0.01, 0.2), "rose"),
        ((-0.2, -0.01), "fell"),
        ((-0.1, 0.2), "unclear"),
        ((0.0, 0.2), "unclear"),
        ((-0.2, 0.0), "unclear"),
        ((None, None), "unknown"),
    ],
)
def test_nothing_rises_or_falls_unless_its_interval_leaves_zero_out(ci95: tuple, expected: str) -> None:
    assert verdict(Estimate(mean=0.05, ci95=ci95)) == expected


def test_no_mean_is_unknown() -> None:
    assert verdict(Estimate(mean=None, ci95=(0.1, 0.2))) == "unknown"


def test_value_and_interval() -> None:
    assert plain(value_and_interval(Estimate(mean=0.4, ci95=(0.38, 0.44)))) == "0.40 [0.38, 0.44]"
    assert plain(value_and_interval(Estimate(mean=-0.2, ci95=(-0.3, 0.1)), signed=True)) == "−0.20 [−0.30, +0.10]"
    assert value_and_interval(Estimate(mean=None)) == "–"
    assert value_and_interval(Estimate(mean=0.5)) == "0.50"


def test_rounding_does_not_hide_that_an_interval_leaves_zero_out() -> None:
    assert plain(value_and_interval(Estimate(mean=0.01, ci95=(0.002, 0.02)), signed=True)) == "+0.010 [+0.002, +0.020]"


def test_percent() -> None:
    assert plain(percent(Estimate(mean=0.38, ci95=(0.31, 0.45)))) == "38% [31%, 45%]"
    assert plain(percent(Estimate(mean=0.07, ci95=(-0.02, 0.16)), signed=True)) == "+7 [−2, +16]"
    assert percent(Estimate(mean=0.07)) == "7%" and percent(Estimate(mean=None)) == "–"


def plain(text: str) -> str:
    """Without the spaces that do not break."""
    return text.replace("\u00a0", " ")


def test_words() -> None:
    assert [joined(parts) for parts in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
    assert [duration(s) for s in (0.84, 41.2, 252, 7500, None)] == ["0.8 s", "41 s", "4 min 12 s", "2 h 5 min", "–"]
    assert [amount(v) for v in (0, 999, 1_148_000, 999_999_999, 2.5e13, None)] == [
        "0", "999", "1.15 M", "1.00 G", "25.0 T", "–",
    ]  # fmt: skip
    assert policy_label("grpo") == "GRPO" and policy_label("best_of_16") == "best of 16"


def test_markup_is_escaped_and_hiding_characters_are_spelled_out() -> None:
    shown = visible("<b>\u202egnp.exe\u202c & \x00\x1b[31m\u200b\ufeff\u2028\ud800\U000e0041 ok\n\tnext")
    assert "<b>" not in shown and "&lt;b&gt;" in shown and "&amp;" in shown
    for code in ("202E", "202C", "0000", "001B", "200B", "FEFF", "2028", "D800", "E0041"):
        assert f'<span class="odd">U+{code}</span>' in shown
    assert not set(shown) & set("\u202e\u202c\x00\x1b\u200b\ufeff\u2028\ud800\U000e0041")
    assert shown.endswith(" ok\n\tnext")
    assert visible("a\r\nb") == "a\nb"


def test_ordinary_letters_of_any_script_stay() -> None:
    text = "naïve Größe 你好 مرحبا 🙂"
    assert visible(text) == text


def test_visible_line() -> None:
    assert visible_line("a\n b\u202ec") == "a b<U+202E>c"
