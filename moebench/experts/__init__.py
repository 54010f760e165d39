"""HOW experts compute: banks, capacity, dispatch and combine, the MoE layer, expert layouts. Needs torch alone."""
