"""The optimizer of a cell: parameter groups, Muon beside AdamW, the schedule, and scaling with width."""
