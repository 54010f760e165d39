"""What MoE layers do while they are trained: values of each layer at logged steps, and the alarm of a collapse."""
