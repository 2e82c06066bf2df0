"""Whole models of random weights, a decoder block at a time, through the real pipeline."""

from bench.model.cli import command

__all__ = ["command"]
