"""``mode=check``: whether the machines that a run will use are ready for it. The flow is in command.py."""
