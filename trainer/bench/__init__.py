"""Measurements, paired and repeated.

In: a configuration, optional peers.
Out: ratios with medians and ranges, as tables and JSON.
Never: judges: targets belong to tests and docs.
"""
