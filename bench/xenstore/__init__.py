"""The store's benchmarks: daemons, clients and engine, each beside Debian's own in the same run.

Everything runs on one CPU, as a store and its clients do in a small dom0. The two sides of a row take short
turns, and the best turn of each counts: noise hits both.
"""
