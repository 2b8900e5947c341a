"""One stage of training, and what it is made of."""
