"""Who computes together, and how they stay one: workers, strategies, sums, transport, and what fails.

Nothing here knows of models, text or the loop.
"""
