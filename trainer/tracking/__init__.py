"""The journal to MLflow, in a process of its own; the only importer of mlflow.

In: lines of a journal.
Out: MLflow runs, params, metrics, artifacts; `mlflow.json` with what was uploaded.
Never: slows down or ends a training.
"""
