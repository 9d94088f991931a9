"""Which points need a wider type: errors at several types, what they cost, and the smallest choice that suffices."""
