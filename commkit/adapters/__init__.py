"""Attach points in other people's wrappers. Adapters translate; they never compute."""
