"""One self-contained HTML file per run, for whoever wants to see what it did.

    write_page(out / "report.html", Content("Private fine-tuning of tiny-llama", ...))

Every part of `Content` but the title is optional: what a run does not know is left out of the page.
`content_of` makes one from the figures that scenarios record, `Watch` is the trace that sees one
request beside it. The page loads nothing, and holds private text: it is the owner's.
"""

from scenarios.page.content import Checks, Content, Curve, Part, Request, Sample, Traffic
from scenarios.page.figures import content_of, environment
from scenarios.page.render import page, write_page
from scenarios.page.watch import Watch

__all__ = [
    "Checks", "Content", "Curve", "Part", "Request", "Sample", "Traffic", "Watch", "content_of",
    "environment", "page", "write_page",
]  # fmt: skip
