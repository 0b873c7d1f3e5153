"""The module-LWE cipher on an NVIDIA GPU: the worker's product, the owner's rings, the hints.

The same bytes on the wire as the CPU backend. Nothing is imported here, so that the worker's
modules stay apart from the owner's.
"""
