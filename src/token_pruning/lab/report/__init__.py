"""The report: one HTML page with the results, the plots and the tokens of a few texts."""

from token_pruning.lab.report.page import write_report

__all__ = ["write_report"]
