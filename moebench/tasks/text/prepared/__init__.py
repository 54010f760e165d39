"""Prepared folders of tokens: made once by `moebench prepare` from text of any size, memory-mapped by every run."""
