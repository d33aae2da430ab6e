"""Reports: a run as tables, figures and one page, and a training while it runs."""
