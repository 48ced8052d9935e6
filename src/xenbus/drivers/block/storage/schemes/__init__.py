"""One file a scheme; each registers itself when it is imported. Nothing else names them."""
