"""Models of cost: FLOPs now, memory and time later."""
