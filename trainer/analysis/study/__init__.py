"""A study: arms and questions of a file, answered from kept journals.

In: a study file, journals.
Out: a page of Markdown with pictures.
Never: starts a run.
"""
