"""The step, the loop around it, and what is kept of a run: checkpoints, progress, recovery.

The loop does not know what is trained.
"""
