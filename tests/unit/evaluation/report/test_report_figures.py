"""The pictures, the command, and that nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from tests.report_toys import edit, quickstart_directory, run_directory

from equipoise.cli.main import run
from equipoise.cli.report import report_command
from equipoise.errors import DataError
from equipoise.evaluation.report import build_report
from equipoise.evaluation.report.build import render
from equipoise.evaluation.report.inputs import read_report_data
from equipoise.evaluation.report.pictures import file_stem


def test_report_and_figures(quickstart: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report_command(quickstart)
    assert capsys.readouterr().out == f"{quickstart / 'report.html'}\n"
    names = sorted(path.name for path in (quickstart / "figures").iterdir())
    assert names == [
        "by_kind.png",
        "controls.png",
        "learning_grpo.png",
        "learning_reward.png",
        "learning_sft.png",
        "outcome.png",
        "overview.png",
        "refusals.png",
        "reward_quality.png",
    ]
    overview = imread(quickstart / "figures" / "overview.png")
    assert overview.shape[1] == 1600
    border = np.concatenate([overview[0], overview[-1], overview[:, 0], overview[:, -1]])
    assert (border[:, :3] == 1.0).all()  # white to the edge: nothing is cut off
    assert (overview[..., :3] < 0.5).any()
    assert not list(quickstart.rglob("*.tmp"))


def test_several_methods_and_names_that_no_file_bears(tmp_path: Path) -> None:
    directory = quickstart_directory(tmp_path / "q", methods=("grpo", "ppo", "dpo"), seeds=2, controls=None)
    edit(directory / "comparison.json", lambda v: v["methods"].update({"$x^2$ 测试": v["methods"].pop("dpo")}))
    page = build_report(directory).read_text(encoding="utf-8")
    assert "$x^2$ 测试" in page and (directory / "figures" / "overview.png").is_file()


def test_a_run_has_curves_and_no_overview(tmp_path: Path) -> None:
    build_report(run_directory(tmp_path / "grpo", steps=6))
    assert [path.name for path in (tmp_path / "grpo" / "figures").iterdir()] == ["learning_grpo.png"]


def test_nothing_is_written_where_the_input_is_broken(quickstart: Path) -> None:
    (quickstart / "controls.json").write_text("{")
    with pytest.raises(DataError, match=r"controls\.json"):
        build_report(quickstart)
    assert not (quickstart / "report.html").exists() and not (quickstart / "figures").exists()


def test_the_same_directory_gives_the_same_page(quickstart: Path) -> None:
    assert render(read_report_data(quickstart)) == render(read_report_data(quickstart))


def test_the_command_ends_with_one_message_and_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["equipoise", "report", str(tmp_path / "absent")])
    monkeypatch.setattr("equipoise.cli.main._set_up_logging", lambda: None)  # it would outlive this test
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith(f"equipoise: {tmp_path / 'absent'}: no such directory") and "\n" not in message


def test_file_stem() -> None:
    assert file_stem("learning_a/../b") == "learning_a_.._b" and file_stem("..") == "figure"
