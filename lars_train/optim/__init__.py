"""The LARS optimizer, the learning-rate schedule and the parameter groups.

The folder can be copied into another package: it imports only torch, itself, and `extensions` for the C kernels.
This file imports nothing, so that the schedule can be used without torch.
"""
