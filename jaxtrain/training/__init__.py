"""Training as pure functions of a state and data, and the host loop around them."""
