"""A small speech LM of the project's own: the sentences it says, its training data, its training, its scores.

grammar: sentences and which part they belong to. data: speech to sequences of tokens. training: the training loop.
"""
