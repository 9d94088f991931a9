"""Numbers: integer types, ranges of data, and the scales that follow from them."""
