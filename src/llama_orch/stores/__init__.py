"""What the service keeps on this machine's disk: one SQLite file for all stores, and blobs beside it.

A store is plain and blocks; `Database.run` takes it off the event loop.
"""
