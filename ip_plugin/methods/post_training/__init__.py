"""What is done to a trained network without training it: fitted bases, refinement, reconstruction."""
