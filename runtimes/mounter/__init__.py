"""Mounting into containers that already run."""
