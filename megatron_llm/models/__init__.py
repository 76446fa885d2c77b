"""The decoder: modules made of the sharded layers of `parallel`, cut into pipeline stages."""
