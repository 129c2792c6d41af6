"""The report: one self-contained page from a directory of results, and its figures."""

from equipoise.evaluation.report.build import build_report

__all__ = ["build_report"]
