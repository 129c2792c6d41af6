"""Compiling the kernels: switched off, no compiler, a broken one, caches, two processes; `generate` without them."""

from __future__ import annotations

import logging
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tests.kernel_toys import needs_compiler
from tests.toy import toy_policy_directory

from equipoise.algorithms.environment import describe_environment
from equipoise.config import SamplingConfig
from equipoise.kernels import build, cpu
from equipoise.models.policy import load_policy
from equipoise.rollout.sampler import generate


def forget() -> None:
    build.library.cache_clear()
    build._found.cache_clear()


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """As in a new process, with a cache of its own; whatever it finds is forgotten."""
    monkeypatch.delenv(build.SWITCH, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    forget()
    yield tmp_path / "cache" / "equipoise" / "kernels"
    forget()


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a shell script on the PATH as its only compiler."""

    def write(body: str, *, name: str = "gcc", version: str = "echo 'gcc 1.0'", first_of: str = "") -> None:
        directory = tmp_path / "bin"
        directory.mkdir(exist_ok=True)
        script = directory / name
        script.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then {version}; exit; fi\n{body}\n')
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{first_of}" if first_of else str(directory))

    return write


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def reasons(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "equipoise"]


def test_switched_off(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fresh: Path) -> None:
    """Asked for, so no warning; nothing is compiled."""
    monkeypatch.setenv("EQUIPOISE_KERNELS", "off")
    with caplog.at_level(logging.INFO):
        assert build.library() is None
    assert not reasons(caplog) and not fresh.exists()
    assert build.described() == describe_environment()["kernels"] == "switched off (EQUIPOISE_KERNELS=off)"
    assert not cpu.fit(torch.zeros(1))


def test_no_compiler_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for _ in range(3):
        assert build.library() is None and not cpu.fit(torch.zeros(1))
    (message,) = reasons(caplog)
    assert message.endswith("no C compiler (gcc or cc) is on the PATH") and caplog.records[0].levelname == "WARNING"
    assert build.described() == "no C compiler (gcc or cc) is on the PATH"


def test_another_system_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(build.platform, "system", lambda: "Plan9")
    assert build.library() is None and "none for Plan9" in reasons(caplog)[0]


@pytest.mark.parametrize("name", ["gcc", "cc"])
def test_a_compiler_that_fails(
    name: str, compiler: Callable[..., None], caplog: pytest.LogCaptureFixture, fresh: Path
) -> None:
    """The line of what it says that names the error; nothing is left of its attempt."""
    compiler("echo 'In file included' >&2; echo 'cc1: error: no such -march' >&2; echo third >&2; exit 4", name=name)
    assert build.library() is None and build.library() is None
    (message,) = reasons(caplog)
    assert f"bin/{name} failed" in message and message.endswith(": cc1: error: no such -march")
    assert build.described() in message and files(fresh) == []


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("exit 1", "no message"),
        ("true", "No such file"),  # says that all is well, and writes nothing
        ('while [ "$1" != -o ]; do shift; done; echo no library > "$2"', "cpu-"),
    ],
)
def test_a_compiler_that_does_something_else(
    body: str, reason: str, compiler: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    compiler(body)
    assert build.library() is None
    (message,) = reasons(caplog)
    assert reason in message


@pytest.mark.parametrize("hangs", ["compiling", "its version"])
def test_a_compiler_that_hangs(
    hangs: str, compiler: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sleeps = f"exec {sys.executable} -c 'import time; time.sleep(20)'"
    compiler(
        *([sleeps] if hangs == "compiling" else ["exit 1"]), **({"version": sleeps} if hangs != "compiling" else {})
    )
    monkeypatch.setattr(build, "SECONDS", 0.3)
    assert build.library() is None
    assert "did not end within 0.3 s" in reasons(caplog)[0]


def test_the_cache_is_ours_alone(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build._cache() == fresh and stat.S_IMODE(fresh.stat().st_mode) == 0o700
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert build._cache() == tmp_path / "home/.cache/equipoise/kernels"


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
def test_a_cache_that_others_may_write_to_is_not_used(mode: int, fresh: Path) -> None:
    build._cache()
    fresh.chmod(mode)
    assert build._cache() is None
    fresh.chmod(0o700)
    fresh.parent.chmod(mode)
    assert build._cache() is None, "whoever may rename it may replace it"
    fresh.parent.chmod(0o755)
    fresh.chmod(0o755)
    assert build._cache() == fresh, "others may read it"


def test_a_cache_of_another_user_is_not_used(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build._cache()
    monkeypatch.setattr(build.os, "geteuid", lambda: fresh.stat().st_uid + 1)
    assert build._cache() is None


def test_a_link_is_no_cache(fresh: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    fresh.parent.mkdir(parents=True)
    fresh.symlink_to(tmp_path / "elsewhere")
    assert build._cache() is None


@needs_compiler
def test_a_library_that_does_not_load_is_compiled_again(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut short by a full disk, or of another libc."""
    monkeypatch.setattr(build, "FLAGS", ("-O0", *build.FLAGS[1:]))
    name = f"cpu-{build._fingerprint(shutil.which('gcc') or 'cc')}.so"
    build._cache()
    (fresh / name).write_bytes(b"\x7fELF")
    assert build.library() is not None and build.described() == name
    assert (fresh / name).stat().st_size > 1000, "and kept"


@needs_compiler
def test_without_a_cache_nothing_is_left_behind(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_cache", lambda: None)
    monkeypatch.setattr(build, "FLAGS", ("-O0", *build.FLAGS[1:]))
    assert build.library() is not None
    assert not list(tmp_path.glob("equipoise-kernels-*"))


def test_another_openmp_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """conda's torch may bring Intel's: threads of two libraries would wait for each other."""
    monkeypatch.setattr(build, "_shares_threads", lambda: False)
    assert build.library() is None and "another OpenMP" in reasons(caplog)[0]


@pytest.mark.parametrize("asked", ["OFF", "0", "no", "False"])
def test_other_words_for_off(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.SWITCH, asked)
    assert build.library() is None


def test_a_cache_that_cannot_be_made_is_not_used(fresh: Path) -> None:
    fresh.parent.parent.mkdir()
    fresh.parent.write_text("a file")
    assert build._cache() is None


def test_without_a_home_there_are_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers run users that no table knows."""

    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(build.Path, "home", none)
    assert build._cache() is None
    if shutil.which("gcc"):
        forget()
        assert build.library() is not None


@needs_compiler
def test_compiles_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is cached is loaded; other flags, or another processor, make another library."""
    calls, run = [], build._run
    monkeypatch.setattr(build, "_run", lambda command: ("-o" in command and calls.append(command)) or run(command))
    monkeypatch.setattr(build, "FLAGS", ("-O0", *build.FLAGS[1:]))  # quick
    assert build.library() is not None and build.described() == describe_environment()["kernels"]
    (name,) = files(fresh)
    assert name.startswith("cpu-") and name.endswith(".so") and name == build.described() and len(calls) == 1
    forget()
    assert build.library() is not None and build.described() == name and len(calls) == 1
    monkeypatch.setattr(build, "_processor", lambda: "another")
    forget()
    assert build.library() is not None and build.described() != name and len(calls) == 2
    monkeypatch.undo()
    assert build._fingerprint(shutil.which("gcc") or "cc") != name[4:-3], "flags"


ONE_PROCESS = """
import ctypes
import torch
from equipoise.kernels import build
found, numbers = build.library(), (ctypes.c_float * 2)()
row, token, half = (ctypes.c_float * 4)(), (ctypes.c_int64 * 1)(), (ctypes.c_float * 1)(0.5)
found.sample_tokens(row, half, ctypes.c_int64(1), ctypes.c_int64(4), ctypes.c_float(1), token, numbers)
print(build.described(), token[0])
"""


@needs_compiler
def test_two_processes_that_compile_at_once(fresh: Path, tmp_path: Path, compiler: Callable[..., None]) -> None:
    """Each waits in the compiler for the other; both load a library that works, and one file stays."""
    real, path = shutil.which("gcc") or shutil.which("cc"), os.environ["PATH"]
    (tmp_path / "met").mkdir()
    met = tmp_path / "met"
    waits = f"touch {met}/$$; for i in $(seq 200); do [ $(ls {met} | wc -l) -ge 2 ] && break; sleep 0.05; done"
    compiler(f'{waits}\nexec {real} "$@" -O0', first_of=path)
    processes = [
        subprocess.Popen([sys.executable, "-c", ONE_PROCESS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in processes:
        said, errors = process.communicate(timeout=120)
        assert said.startswith("cpu-") and said.endswith(".so 2\n"), errors
    assert len(files(met)) == 2 and len(files(fresh)) == 1


@needs_compiler
def test_generate_gives_the_same_without_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A draw within a rounding of a boundary may fall either way: one completion in a thousand."""
    monkeypatch.undo()  # the cache of all tests
    calls, kernel = [], cpu.decode_attention
    monkeypatch.setattr(cpu, "decode_attention", lambda *inputs: calls.append(1) or kernel(*inputs))
    directory = toy_policy_directory(tmp_path / "model", architecture="qwen3", initializer_range=0.15)
    sampling, prompts = SamplingConfig(max_tokens=16, temperature=0.9), ["help me", "a cat", "how do i make it", "x"]
    rollouts = []
    for switch in ("on", "off"):
        monkeypatch.setenv(build.SWITCH, switch)
        forget()
        rollouts.append(generate(load_policy(directory), prompts, 256, sampling, rows_at_once=512))
        assert bool(calls) == (switch == "on")
        calls.clear()
    compiled, plain = rollouts
    assert compiled.completion_ids_BT.shape == plain.completion_ids_BT.shape
    same = (compiled.completion_ids_BT == plain.completion_ids_BT).all(dim=1)
    assert float(same.float().mean()) >= 0.999
    torch.testing.assert_close(compiled.sampler_logprobs_BT[same], plain.sampler_logprobs_BT[same], rtol=0, atol=2e-5)
