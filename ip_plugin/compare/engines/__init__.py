"""What runs the cells of a study: processes on this machine, or an NNI experiment."""
