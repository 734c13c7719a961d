"""What does a pre-trained encoder predict? Labels of clinical tasks, what may be seen of a patient, and metrics."""
