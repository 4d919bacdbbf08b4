"""Measurements inside a training step.

In: clocks, counters on the device, hardware sensors.
Out: readings per log interval: images/s, phases, MFU, goodput, load.
Never: synchronises the device between two log lines.
"""
