"""Conformance suites: classes that a plugin's author subclasses in pytest, with one fixture to fill in.

They prove that a plugin keeps what the core relies on; each failing test says what to fix. See
``docs/conformance.md``. The modules of the suites import pytest, and the policies' hypothesis:
``pip install stoker[testing]``.
"""
