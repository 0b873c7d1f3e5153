"""A worker whose matrices are spread over a Ray cluster: one process, the front door, takes the
owners' requests (`devices.py`), and each shard multiplies with the layers that it holds
(`shard.py`). Ray places the shards, starts them again elsewhere, and carries the bytes.

Nothing here can hold a secret; a test walks its imports.
"""
