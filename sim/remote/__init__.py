"""Simulators in a process and a Python environment of their own.

``serve`` runs there and knows only the standard library and NumPy; ``client`` is our side; both share ``protocol``.
"""
