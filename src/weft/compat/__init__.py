"""Faces of other libraries over weft."""
