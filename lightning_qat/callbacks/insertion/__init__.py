"""What QuantizationAwareTraining does at which hook."""
