"""Coefficients of Clark et al. 2022, table 3, and the sizes from which routing no longer helps (section 5.1)."""

from moebench.analysis.scaling.law import BilinearLaw

PUBLISHED = {
    "S-Base": BilinearLaw(a=-0.082, b=-0.108, c=0.009, d=1.104, e_start=1.847, e_max=314.478),
    "RL-R": BilinearLaw(a=-0.083, b=-0.126, c=0.012, d=1.111, e_start=1.880, e_max=469.982),
    "Hash": BilinearLaw(a=-0.087, b=-0.136, c=0.012, d=1.157, e_start=4.175, e_max=477.741),
}
"""Router, by its name in the data -> its law."""
CUTOFF_PARAMS = {"S-Base": 937e9, "RL-R": 85e9, "Hash": 83e9}
