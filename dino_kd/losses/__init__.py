"""Objectives as pure functions of tensors; running state only in small modules."""
