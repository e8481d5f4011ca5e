"""Pure functions of tensors: what they give depends on their arguments alone.

No weights, no strategies, no files, and no configuration but numbers.
"""
