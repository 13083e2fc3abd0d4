"""Timing: what networks, layers and operations take on this machine, measured."""
