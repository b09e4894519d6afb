"""Decode the bytes of an image to pixels: Pillow, and libjpeg-turbo in C where it could be built."""
