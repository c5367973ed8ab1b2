"""The results of a comparison as types, and the report: one page that needs nothing else, and the numbers behind it."""

from rlhf_pipeline.report.page import write_report
from rlhf_pipeline.report.results import Results, load

__all__ = ["Results", "load", "write_report"]
