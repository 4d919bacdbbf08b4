"""What one run did: accuracy, throughput, kept shares, savings, goodput.

In: the history of a run.
Out: rows of the report, its picture, lines for the journal.
Never: compares two runs.
"""
