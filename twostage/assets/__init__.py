"""Getting the real things: data sets and weights, checked before they are put in place."""
