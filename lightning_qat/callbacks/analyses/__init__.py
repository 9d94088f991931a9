"""What the analysing callbacks share: a pass over sampled batches, when to analyse, the numbers to monitor."""
