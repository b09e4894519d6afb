"""Tables, curves and an HTML page from run directories. Reads files only: no torch, training code or network."""
