"""One checkpoint of a base and an adapter."""
