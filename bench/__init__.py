"""Benchmarks: each row beside its floor or peer, measured in the same run and pinned alike.

`python -m bench` prints a table, `--json` the same as data. Nothing here is a test: a figure is shown
with the ratio that we aim for, and the reader judges.
"""
