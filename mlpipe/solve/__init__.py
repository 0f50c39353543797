"""Solvers: numbers in, numbers out; no SQL, no Arrow, no names."""
