"""Drawing tokens from logits: the formula in plain torch, and kernels that do the same at the
speed of memory.

A token is drawn by the Gumbel-max trick: the likeliest after independent noise
G = -log(E), E = -log(1 - u), was added to each logit / temperature is a sample of their softmax
(Maddison et al., 2014, "A* Sampling"). The u are no generator's state but a pure function of
(seed, position, token id), as counter-based generators have it (Salmon et al., 2011, "Parallel
random numbers: as easy as 1, 2, 3"): the same alone and in a batch, on every rank, and over any
shard of the vocabulary.
"""

# A shard of a vocabulary sends as many of its tokens.
CANDIDATES = 64
