"""What a token in a row can carry besides its id: two bits, so that examples need no second array beside the tokens.

No id reaches them: a vocabulary has fewer than 2**24 tokens. No TensorFlow here.
"""

UNSCORED = 1 << 30  # seen, and not predicted: the token of a prompt
STARTS = 1 << 29  # the end of text before an example: attention begins anew with it
ID_MASK = STARTS - 1
