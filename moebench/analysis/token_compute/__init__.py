"""How many experts each token uses, and whether these are the difficult tokens."""
