"""Scores of rankings and masks as pure functions of arrays; nothing here reads a file."""
