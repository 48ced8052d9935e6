"""Shared-memory rings over any buffer: request/response (`shared`) and bytes (`bytering`).

Imports nothing but the exception tree: no hypervisor, no store, no loop, no thread.
"""
