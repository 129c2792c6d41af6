"""Compiles the loops for this processor, once per user and machine, and loads them.

Nothing here is needed: without them torch's operations compute the same, and a warning says so once. There are none but
on Linux; EQUIPOISE_KERNELS=off asks for none.
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
OFF = ("off", "0", "no", "false")
HERE = Path(__file__).parent
SOURCES = (HERE / "decode.c", HERE / "blocks.c", HERE / "products.c")
HEADER = HERE / "numbers.h"
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
COMPILERS = ("gcc", "cc")
SECONDS = 120


class NoKernels(Exception):
    """Why there are none on this machine."""


def switched_off() -> bool:
    """Whether the environment asks for none."""
    return os.environ.get(SWITCH, "").lower() in OFF


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None where they are switched off or cannot be had, which is said once."""
    found, reason = _found()
    if found is None and not switched_off():
        logger.warning("no compiled loops, so torch's operations do it, and steps on a CPU are slower: %s", reason)
    return found


def described() -> str:
    """For `environment.json`: which kernels are in use, or why none."""
    return _found()[1]


@cache
def _found() -> tuple[ctypes.CDLL | None, str]:
    """The library and its name, or why there is none."""
    if switched_off():
        return None, f"switched off ({SWITCH}={os.environ[SWITCH]})"
    if platform.system() != "Linux":
        return None, f"none for {platform.system()}"
    reasons = []
    try:
        if not _shares_threads():
            raise NoKernels("torch has another OpenMP here than GNU's, whose threads they would not share")
        for compiler in filter(None, map(shutil.which, COMPILERS)):
            try:
                return _loaded(compiler)
            except (NoKernels, OSError) as error:
                reasons.append(str(error))
        raise NoKernels("; ".join(reasons) or f"no C compiler ({' or '.join(COMPILERS)}) is on the PATH")
    except (NoKernels, OSError) as error:
        return None, str(error)


def _shares_threads() -> bool:
    """Whether torch's own threads are GNU OpenMP's: the loader then finds the same library for ours, by its name."""
    return "libgomp" in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")


def _loaded(compiler: str) -> tuple[ctypes.CDLL, str]:
    """The user's library if it is there and loads, else one that is compiled now."""
    name, kept = f"cpu-{_fingerprint(compiler)}.so", _cache()
    if kept is not None and (kept / name).exists():
        try:
            return ctypes.CDLL(str(kept / name)), name
        except OSError as error:  # cut short, of another libc, or on a disk that nothing is run from
            logger.info("%s is compiled again: %s", name, error)
    with tempfile.TemporaryDirectory(prefix="equipoise-kernels-") as temporary:
        made = Path(temporary) / name
        _run([compiler, *FLAGS, *map(str, SOURCES), "-o", str(made), "-lm"])
        found = ctypes.CDLL(str(made))  # stays loaded when the file is gone
        if kept is not None:
            _keep(made, kept)
    return found, name


def _keep(made: Path, kept: Path) -> None:
    """Put a library that loads where the next process finds it; whoever comes second replaces it by its equal."""
    try:
        with tempfile.TemporaryDirectory(dir=kept) as beside:
            shutil.copy(made, Path(beside) / made.name)
            (Path(beside) / made.name).replace(kept / made.name)
    except OSError as error:
        logger.info("%s is not kept, so the next process compiles it again: %s", made.name, error)


def _cache() -> Path | None:
    """The user's directory of libraries; None where there is no home, or others may write to it: they are loaded."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        directory = base / "equipoise" / "kernels"
        base.mkdir(parents=True, exist_ok=True)
        for part in (directory.parent, directory):
            part.mkdir(exist_ok=True, mode=0o700)
            found = part.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                return None
            if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                return None
        return directory
    except (OSError, RuntimeError):  # the latter: nobody knows of a home
        return None


def _fingerprint(compiler: str) -> str:
    """Of all that decides what the compiled code is, the processor's abilities among it: homes are shared."""
    sources = [path.read_text(encoding="utf-8") for path in (*SOURCES, HEADER)]
    parts = [*sources, " ".join(FLAGS), _run([compiler, "--version"]), _processor()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """What cores are and can do, each line once; what changes from boot to boot is left out."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


def _run(command: list[str]) -> str:
    """What the compiler prints. Raises NoKernels where it fails, or does not end."""
    compiler, environment = command[0], {**os.environ, "LC_ALL": "C"}
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, timeout=SECONDS, env=environment
        )
    except subprocess.TimeoutExpired as error:
        raise NoKernels(f"{compiler} did not end within {SECONDS} s") from error
    if ended.returncode:
        lines = ended.stderr.strip().splitlines() or ["no message"]
        raise NoKernels(f"{compiler} failed: {next((line for line in lines if 'error' in line), lines[0])}")
    return ended.stdout
