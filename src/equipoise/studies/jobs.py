"""Processes of a study: started, watched, ended together.

Every job's work is done in a process of its own, so that its peak memory is its own, and one that is killed takes
nothing else with it. What a process says goes to a log file; the last lines of a failed one are its reason.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Protocol

from equipoise.errors import ConfigError, EquipoiseError

if TYPE_CHECKING:  # plan imports quickstart, which starts processes too
    from equipoise.studies.plan import Job, Plan

LOCK_FILE = ".lock"
REASON_LINES = 8  # of the log of a failed process


class Stopped(EquipoiseError):
    """A signal asked the study to stop. Exit code 130 (Ctrl-C), 143 (SIGTERM) or 129 (the terminal is gone)."""

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number
        super().__init__(
            f"stopped by {signal.Signals(number).name}; what is finished is kept, and the same command goes on with it"
        )


class JobFailed(EquipoiseError):
    """A process of a job ended with an error; the message holds its last lines."""


class JobStopped(EquipoiseError):
    """A process of a job was ended because the study stops."""


class Launcher(Protocol):
    """Runs one command of a job to its end."""

    def run(self, command: Sequence[str], log: Path, threads: int) -> None:
        """Raises JobFailed where it fails, JobStopped where it was told to stop."""
        ...

    def stop(self) -> None:
        """Ask what runs to save and end; nothing new starts."""
        ...

    def kill(self) -> None:
        """End what runs at once."""
        ...


class Processes:
    """Launches commands as processes that hold the study's lock and get no signal but ours."""

    def __init__(self, lock: IO[str]) -> None:
        self._lock_file = lock
        self._children: set[subprocess.Popen[bytes]] = set()
        self._guard = threading.Lock()
        self._stopping = False

    def run(self, command: Sequence[str], log: Path, threads: int) -> None:
        """Run a command on so many CPU threads, its output appended to `log`."""
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        with log.open("ab") as output:
            began = output.tell()
            with self._guard:
                if self._stopping:
                    raise JobStopped("the study stops")
                process = subprocess.Popen(
                    list(command),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,  # Ctrl-C in the terminal reaches us alone, and we pass on one signal
                    pass_fds=(self._lock_file.fileno(),),
                )
                self._children.add(process)
            code = process.wait()
            with self._guard:
                self._children.discard(process)
                stopping = self._stopping
        if code == 0:
            return
        if stopping:
            raise JobStopped("the study stops")
        raise JobFailed(_reason(log, began, code))

    def stop(self) -> None:
        """SIGTERM to every child: a training run saves after its step."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to every child."""
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> None:
        with self._guard:
            self._stopping = True
            for process in self._children:
                process.send_signal(number)


def _reason(log: Path, began: int, code: int) -> str:
    """The last lines that a process wrote, or how it died."""
    with log.open("rb") as file:
        file.seek(began)
        said = file.read().decode("utf-8", errors="replace")
    lines = [line.strip() for line in said.splitlines() if line.strip()][-REASON_LINES:]
    if code < 0:
        lines.append(f"ended by {signal.Signals(-code).name}" + (", out of memory?" if code == -signal.SIGKILL else ""))
    return "\n".join(lines) or f"exit code {code}, without a word"


@contextlib.contextmanager
def locked(out: Path) -> Iterator[IO[str]]:
    """The study's lock; its processes inherit it, so that one whose parent was killed still holds it.

    Raises ConfigError where somebody holds it.
    """
    with (out / LOCK_FILE).open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"--out {out}: a study, or a process that a killed one left behind, is at work there; wait for it, "
                f"end it (`fuser {out / LOCK_FILE}` names it), or give another --out"
            ) from error
        yield file


@contextlib.contextmanager
def stopping_on_signals(launcher: Launcher) -> Iterator[None]:
    """The first signal raises Stopped in the main thread; a second one kills what still runs."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            launcher.kill()
            return
        asked = True
        raise Stopped(number)

    # What is ignored stays ignored: that is how nohup and `&` keep a study alive.
    heard = [
        number
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) != signal.SIG_IGN
    ]
    before = {number: signal.signal(number, ask) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def as_one_job(plan: Plan, job: Job) -> Iterator[Path]:
    """The log file of a job; what goes wrong inside is a JobFailed."""
    place = plan.out / job.size / "logs"
    name = job.method if job.seed is None else f"{job.method}_seed_{job.seed}"
    try:
        yield place / f"{name}.log"
    except (JobFailed, JobStopped):
        raise
    except EquipoiseError as error:
        raise JobFailed(str(error)) from error


def run_job(plan: Plan, job: Job, launcher: Launcher, threads: int) -> None:
    """Do what is left of a job. Raises JobFailed or JobStopped."""
    with as_one_job(plan, job) as log:
        for step in plan.steps(job, threads):
            if not step.done():
                launcher.run(step.command(), log, threads)
