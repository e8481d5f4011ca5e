"""The keys of a run: sections, parser, the syntax of sources, and what a run directory holds of them.

Only the rules of a key are here; what it does is in the modules that read it.
"""
