"""Recipes: each module has a `Config` and a `train(config)` that composes parts of tfdp."""
