"""`python -m bench growth`: time and peak memory against sizes, and the exponents of both."""

from bench.growth.cli import command

__all__ = ["command"]
