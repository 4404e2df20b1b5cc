"""What was done to a model and what it brought: in the terminal, as JSON, as one HTML page, and site by site.

print(report)                       # the essentials; report.text(full=True) for every site
report.to_html("report.html")       # one file, no network
explain(report, "encoder.layer.0.*")
"""

from graphwright.drawing.picture import Picture
from graphwright.report.comparison import Comparison
from graphwright.report.explain import explain
from graphwright.report.explanation import Explanation
from graphwright.report.model import Accuracy, Option, Region, Report, SiteRow

__all__ = ["Accuracy", "Comparison", "Explanation", "Option", "Picture", "Region", "Report", "SiteRow", "explain"]
