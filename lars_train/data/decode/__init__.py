"""Decode encoded images to pixels, with Pillow or, for JPEGs, an optional C extension on libjpeg-turbo."""
