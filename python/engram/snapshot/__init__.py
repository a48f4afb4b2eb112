"""The two stored formats, segment and manifest: encode, decode, verify. Pure, no files."""
