"""Evaluators that score any frozen backbone; each is also a script."""
