"""What is learned: which tokens of a row a model sees, which it is to predict, who sees whom, and what is reported.

No model and no loop: a task turns rows into a batch, and sums into metrics.
"""
