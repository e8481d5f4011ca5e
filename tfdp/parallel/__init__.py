"""What trains together and stays one model: workers, strategies, sums, transport, failures.

Nothing here knows of models, text or the loop.
"""
