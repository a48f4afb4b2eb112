"""The index over manifests: an SQLite database that can be rebuilt from them at any time."""
