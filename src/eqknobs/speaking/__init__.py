"""Letting a speech LM speak, and judging what it says: what the stages of speech LMs share."""
