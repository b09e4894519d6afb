"""What is known before a run: ``mode=plan`` (forecast.py, rehearsal.py) and ``mode=check`` (check.py)."""
