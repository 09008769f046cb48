"""C sources become libraries that are loaded. Nothing here needs torch."""
