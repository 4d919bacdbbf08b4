"""Runs beside each other: groups of seeds, differences with intervals, one sentence of what they allow to say.

In: histories of runs.
Out: numbers, a table, an HTML page.
Never: decides which runs belong together by anything but their settings.
"""
