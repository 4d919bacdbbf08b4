"""The configuration of a run.

In: a YAML file and `key=value` overrides.
Out: a validated, immutable `Config`, or a ConfigError that names key, value and remedy.
Never: reads data, starts processes or imports any other package of trainer.
"""
