"""Where segments and manifests are kept: the contract, the one durable writer, the disk store."""
