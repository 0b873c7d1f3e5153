"""Drivers: they run the protocol's machines on a real clock and make no protocol decision."""
