"""Where to run: renders commands and job scripts; `__main__` is the one place that starts processes."""
