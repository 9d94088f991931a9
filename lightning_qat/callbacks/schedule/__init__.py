"""What QuantizationAwareTraining changes while a run goes on: scales, batch norm, frozen parts."""
