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
from functools import cache
from pathlib import Path

logger = logging.getLogger("equipoise")

SWITCH = "EQUIPOISE_KERNELS"
HERE = Path(__file__).parent
SOURCES = (HERE / "decode.c", HERE / "blocks.c")
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
        logger.warning("no compiled loops, so torch's operations do their work, and steps on a CPU are slower: %s", reason)
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
        return ctypes.CDLL(str(_compiled())), ""
    except (NoKernels, OSError) as error:
        return None, str(error)


def _compiled() -> Path:
    """The shared library, from the cache if it was compiled before."""
    if platform.system() != "Linux":
        raise NoKernels(f"no kernels for {platform.system()}")
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        raise NoKernels(f"no C compiler ({' or '.join(COMPILERS)}) is on the PATH")
    directory = _directory()
    path = directory / f"cpu-{_fingerprint(compiler)}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=directory) as temporary:
            made = Path(temporary) / path.name
            _compile(compiler, made)
            made.replace(path)  # whoever comes second replaces it by its equal
    return path


def _directory() -> Path:
    """Where nobody else may write: what lies there is loaded into the process."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = base / "equipoise" / "kernels"
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = directory.stat()
        if found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            with tempfile.TemporaryFile(dir=directory):
                return directory
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="equipoise-kernels-"))  # for this process alone


def _fingerprint(compiler: str) -> str:
    """Of all that decides what the compiled code is, the processor's abilities among it: homes are shared."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False, timeout=SECONDS)
    sources = [path.read_text(encoding="utf-8") for path in (*SOURCES, HEADER)]
    parts = [*sources, " ".join(FLAGS), version.stdout, _processor()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    # Of the first core; what differs between cores or from boot to boot is left out.
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


def _compile(compiler: str, to: Path) -> None:
    command = [compiler, *FLAGS, *map(str, SOURCES), "-o", str(to), "-lm"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        raise NoKernels(f"{compiler} did not end within {SECONDS} s") from error
    if ended.returncode:
        first = (ended.stderr.strip().splitlines() or ["no message"])[0]
        raise NoKernels(f"{compiler} failed: {first}")
