"""What every rank of a test runs: several trainings one after another, so that one start-up serves many cases.

    accelerate launch ... -m tests.two_ranks JOBS.json

Jobs are `{"recipe", "out", "resume"?}`; how each ended on each rank is written to `OUT.rank0.json` and so on.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

from equipoise.cli.main import _set_up_logging
from equipoise.cli.train import end_processes, train_recipe


def main(jobs_file: str) -> None:
    """Train every job; an error ends that job only."""
    _set_up_logging()
    for job in json.loads(Path(jobs_file).read_text()):
        ending = {"error": None, "message": "", "exit_code": 0, "traceback": ""}
        try:
            train_recipe(Path(job["recipe"]), [], Path(job["out"]), job.get("resume", False))
        except Exception as error:
            ending["error"], ending["message"] = type(error).__name__, str(error)
            ending["exit_code"] = getattr(error, "exit_code", 1)
            ending["traceback"] = traceback.format_exc()
        Path(f"{job['out']}.rank{os.environ['RANK']}.json").write_text(json.dumps(ending))
    end_processes()


if __name__ == "__main__":
    main(sys.argv[1])
