"""The command line.

In: words of the command line.
Out: calls of the other packages, tables, JSON files, exit codes.
Never: does the work itself.
"""
