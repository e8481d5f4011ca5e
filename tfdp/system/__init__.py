"""The process and its machine: exits, output, start-up, files written whole, cores and GPUs.

Nothing of training.
"""
