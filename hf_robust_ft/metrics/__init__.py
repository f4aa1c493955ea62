"""Metrics for ``evaluate.load``, each in a folder of its own: loaded from its path, offline."""
