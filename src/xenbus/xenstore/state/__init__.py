"""What a store is made of, as the record stream of xenstore-migration.md: written and read. Pure.

records.py: the stream; image.py: what one amounts to; dump.py: engine -> records; load.py: back again.
"""
