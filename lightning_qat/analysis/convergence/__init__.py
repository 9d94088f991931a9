"""Does QAT converge? Judgement of a training series."""
