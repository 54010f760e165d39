"""Many processes: the mesh, the exchange of rows, gradients, checkpoints that any number of processes can load."""
