"""Models and tokenizers in the formats of others: read to start from, and written to be used elsewhere.

What a model computes is in `models/`; here are names, layouts and files alone.
"""
