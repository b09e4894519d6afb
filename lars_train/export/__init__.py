"""A checkpoint's network as a file for others: weights or a graph, with its origin inside and a card beside it."""
