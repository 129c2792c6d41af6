"""Synthetic directories that the tests of the report share; a test that alters one makes its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.report_toys import quickstart_directory

from equipoise.evaluation.report.inputs import ReportData, read_report_data


@pytest.fixture(scope="session")
def one_method(tmp_path_factory: pytest.TempPathFactory) -> ReportData:
    """A quickstart with GRPO alone."""
    return read_report_data(quickstart_directory(tmp_path_factory.mktemp("one") / "quickstart"))


@pytest.fixture(scope="session")
def three_methods(tmp_path_factory: pytest.TempPathFactory) -> ReportData:
    """GRPO, PPO and DPO, three seeds each, with controls of an earlier run."""
    directory = tmp_path_factory.mktemp("three") / "quickstart"
    return read_report_data(
        quickstart_directory(directory, methods=("grpo", "ppo", "dpo"), seeds=3, from_this_run=False)
    )


@pytest.fixture
def quickstart(tmp_path: Path) -> Path:
    """A directory of one's own."""
    return quickstart_directory(tmp_path / "quickstart")
