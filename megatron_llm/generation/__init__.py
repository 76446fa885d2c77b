"""Text from a model: a key/value cache and sampling."""
