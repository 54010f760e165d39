"""The scaling law of Clark et al. 2022 (arXiv:2202.01169, table 3), fitted to the losses that they published.

The losses are in `data/curves.csv.gz` of github.com/google-deepmind/scaling_laws_for_routing (CC-BY 4.0), which is not
part of this package.
"""
