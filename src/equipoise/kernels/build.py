"""Compiles the loops for this processor, once per machine, and loads it.

Nothing here is needed: without a C compiler the same is computed by torch's operations, and a warning says so once.
EQUIPOISE_KERNELS=off asks for that.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

logger = logging.getLogger("equipoise")

SWITCH = "EQUIPOISE_KERNELS"
HERE = Path(__file__).parent
SOURCES = (HERE / "decode.c", HERE / "blocks.c", HERE / "products.c")
HEADER = HERE / "numbers.h"
# The loader finds torch's own libgomp by its name, so that both share one set of threads.
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
COMPILERS = ("gcc", "cc")
SECONDS = 120


class NoKernels(Exception):
    """Why there are none on this machine."""


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None where they are switched off or cannot be had, which is said once."""
    found, reason = _found()
    if found is None and os.environ.get(SWITCH) != "off":
        logger.warning("no compiled loops, so torch's operations do it, and steps on a CPU are slower: %s", reason)
    return found


def described() -> str:
    """For `environment.json`: whether the kernels are in use, or why not."""
    found, reason = _found()
    return "compiled" if found is not None else reason


@cache
def _found() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get(SWITCH) == "off":
        return None, f"switched off ({SWITCH}=off)"
    try:
        with _directory() as directory:
            return ctypes.CDLL(str(_compiled(directory))), ""
    except (NoKernels, OSError) as error:
        return None, str(error)


def _compiled(directory: Path) -> Path:
    """The shared library in this directory, where it lies if it was compiled before."""
    if platform.system() != "Linux":
        raise NoKernels(f"none for {platform.system()}")
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        raise NoKernels(f"no C compiler ({' or '.join(COMPILERS)}) is on the PATH")
    path = directory / f"cpu-{_fingerprint(compiler)}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=directory) as temporary:
            made = Path(temporary) / path.name
            _run([compiler, *FLAGS, *map(str, SOURCES), "-o", str(made), "-lm"])
            made.replace(path)  # whoever comes second replaces it by its equal
    return path


@contextmanager
def _directory() -> Iterator[Path]:
    """Where nobody else may write, since what lies there is loaded: the user's cache, else one for this call alone."""
    kept = _cache()
    if kept is not None:
        yield kept
    else:
        with tempfile.TemporaryDirectory(prefix="equipoise-kernels-") as temporary:
            yield Path(temporary)  # gone once the library is loaded, which does not mind


def _cache() -> Path | None:
    """The user's own directory of libraries; None where there is no home, or it is others' to write to."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        directory = base / "equipoise" / "kernels"
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = directory.stat()
        if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return None
        with tempfile.TemporaryFile(dir=directory):
            return directory
    except (OSError, RuntimeError):  # the latter: nobody knows of a home
        return None


def _fingerprint(compiler: str) -> str:
    """Of all that decides what the compiled code is, the processor's abilities among it: homes are shared."""
    version = _run([compiler, "--version"])
    sources = [path.read_text(encoding="utf-8") for path in (*SOURCES, HEADER)]
    parts = [*sources, " ".join(FLAGS), version, _processor()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    # Of the first core; what differs between cores or from boot to boot is left out.
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


def _run(command: list[str]) -> str:
    """What the compiler prints. Raises NoKernels where it fails, or does not end."""
    compiler = command[0]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        raise NoKernels(f"{compiler} did not end within {SECONDS} s") from error
    if ended.returncode:
        first = (ended.stderr.strip().splitlines() or ["no message"])[0]
        raise NoKernels(f"{compiler} failed: {first}")
    return ended.stdout
