"""Forecast a run (``mode=plan``: forecast.py, rehearsal.py) and check its machines (``mode=check``: check.py)."""
