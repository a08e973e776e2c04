"""Sampling tokens from logits: the formula in plain torch, and kernels at the speed of memory.

Tokens are drawn by the Gumbel-max trick: each logit / temperature gets independent noise G =
-log(E), E = -log(1 - u), and the token with the highest sum is a sample of their softmax (Maddison
et al., 2014, "A* Sampling"). The u come from no generator with a state, but from a pure function
of (seed, position, token id), a counter-based generator (Salmon et al., 2011, "Parallel random
numbers: as easy as 1, 2, 3"). So a token is the same alone and in a batch, on every rank, and over
any shard of the vocabulary.
"""

# Tokens in a shortlist, which a shard of the vocabulary makes for each row.
SHORTLIST_SIZE = 64
