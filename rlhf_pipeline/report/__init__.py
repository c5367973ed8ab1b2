"""The report of a comparison: one page that needs nothing else, and the numbers behind its figures."""

from rlhf_pipeline.report.write import write_report

__all__ = ["write_report"]
