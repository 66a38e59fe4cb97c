"""The Flower app of a federation: the same for server and parties."""
