"""Plan and add seeds of an experiment: the power it is planned for, and runs until every arm is decided."""
