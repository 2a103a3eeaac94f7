"""Meshes, the sharding table, and the transports that carry tokens to experts."""
