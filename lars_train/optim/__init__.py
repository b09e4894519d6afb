"""The LARS optimizer, the learning-rate schedule and the parameter groups.

The folder can be copied into another package together with `extensions.py`, which loads the C kernels: it imports
nothing else from outside but torch. This file imports nothing, so that the schedule can be used without torch.
"""
