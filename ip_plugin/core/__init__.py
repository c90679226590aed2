"""The interspace: layers, their parametrizations and masks, and what converts, masks and trains them."""
