"""Results of finished or running runs.

In: journals, weights.
Out: tables, pictures, one HTML page.
Never: changes a run.
"""
