"""Peers that forward TCP through SSH, driven by the same loads in one run: ``python -m benchmarks``."""
