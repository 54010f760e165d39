"""Other libraries' layers: one adapter file each, imported only where the library is installed."""
