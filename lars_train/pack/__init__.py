"""Pack data sets into stores of tar shards, verify and describe them: the command ``lars-data``."""
