"""The GPT: layers, dropout by key, the shapes of its weights.

Nothing here knows of strategies, steps or files.
"""
