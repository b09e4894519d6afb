"""Tables, curves and a page from run directories. Reads files only: no torch, no training code, no network."""
