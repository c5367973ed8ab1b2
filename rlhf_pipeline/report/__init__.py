"""The results of a comparison as types, and the report: one self-contained page and the CSV files of its figures."""

from rlhf_pipeline.report.page import write_report
from rlhf_pipeline.report.results import Results, load

__all__ = ["Results", "load", "write_report"]
