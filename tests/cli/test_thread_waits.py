"""Waiting threads sleep where another process wants the cores, and nowhere else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from equipoise.cli.thread_waits import FEW, SPINS, _running_besides, choose_waits


def chosen(others: int | None, cores: int = 2, **environment: str) -> dict[str, str]:
    choose_waits(environment, cores=cores, running=lambda: others)
    return environment


def test_alone_nothing_is_set() -> None:
    assert chosen(0) == {} and chosen(None) == {}


@pytest.mark.parametrize(("others", "cores"), [(1, 2), (3, 2), (1, 8)])
def test_threads_on_every_core_beside_others_sleep(others: int, cores: int) -> None:
    assert chosen(others, cores) == {SPINS: FEW}


def test_cores_that_are_left_over_are_enough_for_others() -> None:
    """Four threads and four others on eight cores; a fifth is one too many. One thread waits for nobody."""
    assert SPINS not in chosen(4, 8, OMP_NUM_THREADS="4")
    assert chosen(5, 8, OMP_NUM_THREADS="4,2")[SPINS] == FEW
    assert SPINS not in chosen(9, 8, OMP_NUM_THREADS="1")


def test_what_the_user_set_stays() -> None:
    assert chosen(3, GOMP_SPINCOUNT="77") == {SPINS: "77"}
    assert chosen(3, OMP_WAIT_POLICY="active") == {"OMP_WAIT_POLICY": "active"}


def test_what_a_parent_chose_is_chosen_anew() -> None:
    assert chosen(0, GOMP_SPINCOUNT=FEW) == {} and chosen(1, GOMP_SPINCOUNT=FEW) == {SPINS: FEW}


@pytest.mark.parametrize(("text", "expected"), [("0.5 0.4 0.3 3/120 9", 2), ("0.5 0.4 0.3 1/120 9", 0), ("", None)])
def test_running_threads_are_linux_s(tmp_path: Path, text: str, expected: int | None) -> None:
    file = tmp_path / "loadavg"
    file.write_text(text)
    assert _running_besides(file) == expected
    assert _running_besides(tmp_path / "none") is None


def test_it_is_chosen_before_openmp_is_loaded() -> None:
    """The command line's module brings no torch; the library reads its environment when it is loaded."""
    code = "import sys, json; import equipoise.cli.main; print(json.dumps('torch' in sys.modules))"
    assert json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout) is False
