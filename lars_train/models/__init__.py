"""The networks, their batch normalisation, and how they are built by name."""
