"""The parts of scripts/benchmark.py: contenders, and how they are measured."""
