"""What changes the weights: LARS, the learning-rate schedule, the parameter groups.

Nothing is imported here, so that the schedule can be had without torch.
"""
