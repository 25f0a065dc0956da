"""How people see it: the report as text, tables, figures and a page, a forecast, and numbers for loggers.

All of it is drawn from what is remembered of the finished tasks; no model is run for it. Libraries that draw are
imported when something is drawn.
"""

from lightning_rnf.report import tracking
from lightning_rnf.report.figures import StreamResult, literal, new_figure, plot_retention
from lightning_rnf.report.gates import failing, junit, verdicts
from lightning_rnf.report.retention import RetentionReport, accuracy_rows
from lightning_rnf.report.tables import rich_table

__all__ = [
    "RetentionReport",
    "StreamResult",
    "accuracy_rows",
    "failing",
    "junit",
    "literal",
    "new_figure",
    "plot_retention",
    "rich_table",
    "tracking",
    "verdicts",
]
