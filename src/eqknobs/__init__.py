"""Find and turn the knobs inside neural audio codecs and speech language models."""
