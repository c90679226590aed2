"""What the adapters of several libraries need: views of models, transactions, channels, BatchNorms behind layers."""
