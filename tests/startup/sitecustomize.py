"""Collect garbage rarely in every Python process that a test starts, and not at exit.

Python imports this module at startup because tests/conftest.py puts the folder on PYTHONPATH. Of the CPU seconds of a
process that only imports torch, collections take a quarter. `lars_train.launch.collect_garbage_rarely` does the same.
"""

import atexit
import gc

gc.set_threshold(100_000)
atexit.register(gc.freeze)
