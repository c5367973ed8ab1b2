"""The sections of a report: each makes its part of the page, or nothing where its data are not there."""
