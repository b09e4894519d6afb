"""What changes the weights: LARS, the learning-rate schedule, the parameter groups.

The folder can be copied into another package: it imports torch and itself, and `extensions` for what is built in C.
Nothing is imported here, so that the schedule can be had without torch.
"""
