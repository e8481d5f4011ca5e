"""What is learned: which tokens of a row a model sees, which it predicts, who attends to whom, and the metrics.

No model and no loop: a task turns rows into a batch, and sums into metrics.
"""
