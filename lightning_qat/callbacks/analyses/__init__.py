"""What the analysing callbacks share: the pass over sampled batches, the schedule, the numbers to monitor."""
