"""A small speech LM of the project's own: its training data and its training.

What it says, and how that becomes sequences of tokens, is in `eqknobs.speaking`.
"""
