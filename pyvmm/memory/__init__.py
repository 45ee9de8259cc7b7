"""Guest RAM: the blocks it is made of and the one class that touches it."""
