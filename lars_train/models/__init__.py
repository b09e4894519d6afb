"""The networks, their batch norm over ghost batches, and their weight files."""
