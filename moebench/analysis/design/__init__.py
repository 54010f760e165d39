"""How many seeds a comparison needs, at which level it may claim something, and what pairing them achieves."""
