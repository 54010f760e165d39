"""The synthetic experiment of Chen et al. 2022 (arXiv:2208.02813): a layer of experts against a single network.

Their figures are those of the released notebooks (github.com/uclaml/MoE), which differ from the paper in one respect:
the weight of the chosen expert is its noisy logit, not a softmax of the logits. Routing, dispatch and combination are
this package's; the data, the patch networks and the normalised gradient descent are written from their description.
"""
