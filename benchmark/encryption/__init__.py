"""What encryption at rest costs."""
