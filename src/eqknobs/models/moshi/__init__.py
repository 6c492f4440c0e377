"""Moshi and PersonaPlex: one small network that reads their checkpoints, can be hooked, quantised and loses heads.

config: sizes. network: the two transformers. quantise: NF4. checkpoint: read and save. generate: full-duplex
dialogues. interventions: heads, pruning, rounding, input streams. loudness: the level of a recorded voice. adapter: the
`Model` protocol.
"""
