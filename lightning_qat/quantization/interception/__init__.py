"""Seeing every torch function of a forward, and telling their calls apart by call path."""
