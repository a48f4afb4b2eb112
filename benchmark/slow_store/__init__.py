"""What other requests notice of a store whose every access takes seconds."""
