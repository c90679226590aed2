"""Post-training pruning: fitted bases, their refinement, and layer-wise reconstruction."""
