"""The phases of ``make gpu-first`` and ``make gpu-full``, one script each, and what runs them.

A phase is a module with ``main(argv)``, run by ``python -m gpu.NAME`` with benchmarks/ on the path:
as a script, its folder would be on the path and gpu/profile.py stand for the standard profile.
"""
