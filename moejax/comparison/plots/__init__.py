"""Figures of the report, as Vega-Lite specifications: interactive on the page, and drawn as SVG and PNG beside it."""
