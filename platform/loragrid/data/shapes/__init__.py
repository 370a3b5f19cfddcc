"""Recognises the shape of a source's rows, and makes canonical rows of them."""
