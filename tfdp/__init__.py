"""tfdp: data-parallel training of GPT language models on TensorFlow and Keras 3.

Start with `python -m tfdp.train --help`; docs/design.md has the map of the modules.
"""

__version__ = "0.1.0"
