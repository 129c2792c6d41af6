"""How well `equipoise.refusal.is_refusal` agrees with labels on real responses.

    python benchmarks/refusal_agreement.py --data ../shared/data [--show 20]

Rules were developed on the half of `pairs/coconot_overrefusal` whose sha256(prompt) is even; figures are of the other
half, against two labels: the set's own (chosen complies, rejected refuses), and labels by reading in
`refusal_labels.txt`. Writes docs/results/refusal.json and the table in docs/results/refusal.md.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from equipoise.evaluation.tables import TextTable, printable, show
from equipoise.refusal import is_refusal

ROOT = Path(__file__).resolve().parents[1]
LABELS = Path(__file__).with_name("refusal_labels.txt")
BEGIN, END = "<!-- begin: written by benchmarks/refusal_agreement.py -->", "<!-- end -->"


@dataclass(frozen=True)
class Response:
    """One response with what the detector and the labels say; None: not labelled by reading."""

    prompt: str
    text: str
    report_half: bool
    rejected: bool
    read_as_refusal: bool | None
    detected: bool


def load(data: Path) -> list[Response]:
    """Both responses of every pair."""
    path = data / "pairs" / "coconot_overrefusal.jsonl.gz"
    if not path.is_file():
        raise SystemExit(f"{path}: no such file; give the directory that holds pairs/ as --data")
    refusals = {line for line in LABELS.read_text(encoding="utf-8").splitlines() if not line.startswith("#")}
    responses = []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            report = int(hashlib.sha256(row["prompt"].encode()).hexdigest(), 16) % 2 == 1
            for field in ("chosen", "rejected"):
                key = hashlib.sha256(f"{row['prompt']}\0{row[field]}".encode()).hexdigest()[:16]
                read = key in refusals if report else None
                detected = is_refusal(row[field])
                responses.append(Response(row["prompt"], row[field], report, field == "rejected", read, detected))
    return responses


def wilson(successes: int, total: int) -> dict[str, Any]:
    """A proportion with its 95% Wilson interval. Example: 8 of 10: 0.8 [0.490, 0.943]."""
    if total == 0:
        return {"mean": None, "ci95": [None, None], "n": 0}
    z = 1.959964
    rate = successes / total
    centre = (rate + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(rate * (1 - rate) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return {"mean": rate, "ci95": [centre - half, centre + half], "n": total}


def agreement(pairs: list[tuple[bool, bool]]) -> dict[str, Any]:
    """Accuracy, precision and recall of (detected, labelled) pairs."""
    both = sum(detected and labelled for detected, labelled in pairs)
    return {
        "accuracy": wilson(sum(detected == labelled for detected, labelled in pairs), len(pairs)),
        "precision": wilson(both, sum(detected for detected, _ in pairs)),
        "recall": wilson(both, sum(labelled for _, labelled in pairs)),
    }


def measure(responses: list[Response]) -> dict[str, Any]:
    """Agreement by half and by label."""
    report = [r for r in responses if r.report_half]
    develop = [r for r in responses if not r.report_half]
    return {
        "report half, labels by reading": agreement([(r.detected, bool(r.read_as_refusal)) for r in report]),
        "report half, the set's labels": agreement([(r.detected, r.rejected) for r in report]),
        "development half, the set's labels": agreement([(r.detected, r.rejected) for r in develop]),
        "report half, the set's labels against reading": agreement(
            [(r.rejected, bool(r.read_as_refusal)) for r in report]
        ),
    }


def _cell(value: dict[str, Any]) -> str:
    if value["mean"] is None:
        return "-"
    return f"{value['mean']:.3f} [{value['ci95'][0]:.3f}, {value['ci95'][1]:.3f}], n {value['n']}"


def table(results: dict[str, Any]) -> TextTable:
    """One row per comparison."""
    columns = ("accuracy", "precision", "recall")
    rows = tuple((name, *(_cell(values[column]) for column in columns)) for name, values in results.items())
    return TextTable("Refusal detector, proportion [95% Wilson interval], n of the denominator", ("", *columns), rows)


def write_document(path: Path, text: str) -> None:
    """Replace what stands between the markers; the prose around it is written by hand."""
    document = path.read_text(encoding="utf-8")
    head, rest = document.split(BEGIN)
    path.write_text(f"{head}{BEGIN}\n{text}{END}{rest.split(END)[1]}", encoding="utf-8")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory that holds pairs/")
    parser.add_argument("--show", type=int, default=0, help="print this many disagreements with the reading labels")
    arguments = parser.parse_args()
    responses = load(arguments.data)
    results = measure(responses)
    machine = {
        "date": datetime.now(UTC).date().isoformat(),
        "equipoise": version("equipoise"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "rules_sha256": hashlib.sha256((ROOT / "src/equipoise/evaluation/refusal.py").read_bytes()).hexdigest()[:16],
        "responses": len(responses),
        "report_half": sum(r.report_half for r in responses),
        "refusals_by_reading": sum(bool(r.read_as_refusal) for r in responses),
    }
    show(table(results))
    wrong = [r for r in responses if r.report_half and r.detected != r.read_as_refusal]
    for response in wrong[: arguments.show]:
        said = "detected, read as an answer" if response.detected else "read as a refusal, not detected"
        print(f"\n[{said}] {printable(response.prompt)[:100]}\n  {printable(response.text)[:400]}")
    (ROOT / "docs/results/refusal.json").write_text(json.dumps({"results": results, **machine}, indent=2) + "\n")
    facts = ", ".join(f"{key} {value}" for key, value in machine.items())
    write_document(ROOT / "docs/results/refusal.md", f"\n{table(results).markdown()}\n{facts}\n\n")


if __name__ == "__main__":
    main()
