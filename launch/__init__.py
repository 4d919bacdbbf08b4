"""Where to run: renders commands and job scripts; `processes` is the one place that starts them."""
