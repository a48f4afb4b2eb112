"""How long a catalog of many snapshots takes to open, to ask and to plan over."""
