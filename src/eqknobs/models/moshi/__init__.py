"""Moshi and PersonaPlex: one small network that reads their checkpoints, can be hooked, quantised and loses heads."""
