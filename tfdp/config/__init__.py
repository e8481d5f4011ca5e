"""The keys of a run: sections, parser, the syntax of sources, and what a run directory holds of them.

No key means anything here but its own rule.
"""
