"""Decoder-only models that both moebench and transformers compute: what they are, and the weights of each."""
