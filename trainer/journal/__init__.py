"""The run's own record.

In: one JSON object per event, from rank 0.
Out: `journal.jsonl`, and readers that survive torn lines and follow resumed runs.
Never: contacts MLflow or a network.
"""
