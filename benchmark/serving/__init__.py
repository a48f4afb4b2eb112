"""What snapshot persistence costs in throughput."""
