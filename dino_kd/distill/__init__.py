"""Teach a small network what a backbone knows; `story` reads top to bottom.

The command is in `command`; `arms` compares students with and without a teacher.
"""
